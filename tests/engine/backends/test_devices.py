"""What becomes of work when a device lacks memory or fails: the kernels run by fibers, under a limit that is real, or
in a process that is killed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine.backends.cuda import CudaBackend
from service.engine.backends.device import Device, DeviceFailed
from service.engine.backends.reference import ReferenceBackend
from service.engine.backends.work import Work
from service.engine.methods.minmax import MinMax
from service.engine.progress import Happening, TensorCompleted
from service.engine.schemes.integer import IntegerScheme
from tests.engine.backends.fiber_device import FiberDevice
from tests.engine.backends.test_cpu import assert_same
from tests.engine.helpers import files_of, normal, run, save, save_folder, specs

SCHEME, REFERENCE = IntegerScheme(), ReferenceBackend()


def computed(work: Work) -> dict[str, np.ndarray]:
    """The outputs, made in this process."""
    device = FiberDevice()
    device.collect(device.submit(work))
    return dict(work.outputs)


class ChildDevice(Device):
    """Fibers in a process of their own, which can be killed."""

    def __init__(self, name: str) -> None:
        self.name, self.slots = name, 2
        self._child = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self.pid = self._child.submit(os.getpid).result()

    def submit(self, work: Work) -> Any:
        """See `Device.submit`."""
        try:
            return work, self._child.submit(computed, work)
        except BrokenProcessPool as error:
            raise DeviceFailed(str(error)) from error

    def collect(self, ticket: Any) -> None:
        """See `Device.collect`."""
        work, made = ticket
        try:
            for name, array in made.result().items():
                work.outputs[name][...] = array
        except BrokenProcessPool as error:
            raise DeviceFailed(str(error)) from error

    def release(self) -> None:
        """See `Device.release`: nothing is kept."""

    def close(self) -> None:
        """End the process."""
        self._child.shutdown(cancel_futures=True)


@pytest.fixture
def child() -> Iterator[ChildDevice]:
    """A device that can be killed."""
    device = ChildDevice("child")
    yield device
    device.close()


def test_a_device_that_lacks_memory_gets_fewer_rows_at_a_time_until_they_fit(rng) -> None:
    x = rng.standard_normal((400, 256)).astype(np.float32)
    cuda = CudaBackend(1, devices=[FiberDevice(memory_bytes=x.nbytes // 4)])
    assert_same(cuda.quantize(x, SCHEME, MinMax()), REFERENCE.quantize(x, SCHEME, MinMax()))
    (notice,) = cuda.take_notices()
    assert notice.startswith("fibers has not enough memory")
    assert cuda.take_notices() == []
    assert cuda.lost_devices() == {}
    assert_same(cuda.quantize(x[:10], SCHEME, MinMax()), REFERENCE.quantize(x[:10], SCHEME, MinMax()))
    assert cuda.take_notices() == [], "what fits is not told of"


def test_what_does_not_fit_a_row_at_a_time_the_cpu_computes(rng) -> None:
    x = rng.standard_normal((6, 4096)).astype(np.float32)
    cuda = CudaBackend(1, devices=[FiberDevice(memory_bytes=4096)])
    q = cuda.quantize(x, SCHEME, MinMax())
    assert_same(q, REFERENCE.quantize(x, SCHEME, MinMax()))
    assert np.array_equal(cuda.dequantize(q), REFERENCE.dequantize(q))
    assert cuda.compare(x, x).sum_dd == 0
    assert np.array_equal(cuda.observe(x).counts, REFERENCE.observe(x).counts)
    assert all("the CPU" in notice for notice in cuda.take_notices())


def test_a_device_that_fails_is_out_of_service_and_another_one_goes_on(child: ChildDevice, rng) -> None:
    x = rng.standard_normal((3000, 800)).astype(np.float32)  # several pieces
    cuda = CudaBackend(1, devices=[FiberDevice(name="other"), child])
    os.kill(child.pid, signal.SIGKILL)
    assert_same(cuda.quantize(x, SCHEME, MinMax()), REFERENCE.quantize(x, SCHEME, MinMax()))
    assert list(cuda.lost_devices()) == ["child"]
    (notice,) = cuda.take_notices()
    assert "another device goes on" in notice


def test_a_job_comes_to_its_end_on_the_cpu_when_the_last_device_fails_and_says_so(
    child: ChildDevice, tmp_path: Path
) -> None:
    tensors = {f"layer{i}.weight": normal(1100, 256, seed=i) for i in range(6)}  # each goes alone
    source = save(tmp_path / "m.safetensors", tensors)
    cuda = CudaBackend(1, devices=[child])

    class Listener(list[Happening]):
        """Hears of every step, and kills the device when a tensor is done."""

        def append(self, happening: Happening) -> None:
            """See `list.append`."""
            super().append(happening)
            if isinstance(happening, TensorCompleted) and not cuda.lost_devices():
                os.kill(child.pid, signal.SIGKILL)

    report = run(source, tmp_path / "cuda", specs("parquet"), backend=cuda, happenings=Listener())
    expected = run(source, tmp_path / "reference", specs("parquet"))
    assert list(cuda.lost_devices()) == ["child"]
    assert [w for w in report.warnings if "out of service" in w], report.warnings
    for mine, theirs in zip(report.outputs[0].tensors, expected.outputs[0].tensors, strict=True):
        assert mine.sums is not None
        assert theirs.sums is not None
        assert mine.sums.sum_dd == pytest.approx(theirs.sums.sum_dd, rel=1e-6)


class CountingDevice(FiberDevice):
    """Counts the launches."""

    launches = 0

    def submit(self, work: Work) -> Any:
        """See `Device.submit`."""
        self.launches += len(work.launches)
        return super().submit(work)


def test_the_small_tensors_of_a_model_share_launches(tmp_path: Path) -> None:
    tensors = {f"layer{i:03}.weight": normal(16 + i % 3, 256, seed=i) for i in range(300)}
    source = save_folder(tmp_path / "model", tensors)
    device = CountingDevice()
    run(source, tmp_path / "cuda", specs("compressed-tensors"), backend=CudaBackend(1, devices=[device]))
    run(source, tmp_path / "reference", specs("compressed-tensors"))
    assert device.launches == 1
    mine, theirs = (files_of(tmp_path / name / "compressed-tensors") for name in ("cuda", "reference"))
    assert mine["model.safetensors"] == theirs["model.safetensors"]


@pytest.mark.parametrize("memory", [200_000, 30_000, 1_000])
def test_many_tensors_for_which_memory_lacks_go_by_fewer_and_then_on_the_cpu(memory: int, rng) -> None:
    xs = [rng.standard_normal((8, 256)).astype(np.float32) for _ in range(40)]
    cuda = CudaBackend(1, devices=[FiberDevice(memory_bytes=memory)])
    for mine, x in zip(cuda.quantize_many(xs, SCHEME, MinMax()), xs, strict=True):
        assert_same(mine, REFERENCE.quantize(x, SCHEME, MinMax()))
    (notice,) = cuda.take_notices()
    assert ("on the CPU" if memory == 1_000 else "tensors at once") in notice


def test_many_tensors_are_quantized_again_when_the_device_fails_amid_them(child: ChildDevice, rng) -> None:
    xs = [rng.standard_normal((8, 256)).astype(np.float32) for _ in range(40)]
    cuda = CudaBackend(1, devices=[child])
    os.kill(child.pid, signal.SIGKILL)
    for mine, x in zip(cuda.quantize_many(xs, SCHEME, MinMax()), xs, strict=True):
        assert_same(mine, REFERENCE.quantize(x, SCHEME, MinMax()))
    assert list(cuda.lost_devices()) == ["child"]
