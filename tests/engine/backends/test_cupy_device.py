"""The part that speaks to CuPy: with its own compiler and errors, and fibers for what would need a driver."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import cupy
import numpy as np
import pytest
from cuda.pathfinder import load_nvidia_dynamic_lib

from service.engine.backends.cuda import PIECE_BYTES, CudaBackend
from service.engine.backends.cupy_device import SLOTS, compile_source, device_count, why_not
from service.engine.backends.reference import ReferenceBackend
from service.engine.backends.registry import choose_backend
from service.engine.methods.minmax import MinMax
from service.engine.schemes.integer import IntegerScheme
from tests.engine.backends import fiber_cuda
from tests.engine.backends.fiber_cuda import FiberCuda
from tests.engine.backends.test_cpu import assert_same

SCHEME, REFERENCE = IntegerScheme(), ReferenceBackend()


def weights(rng: np.random.Generator, nbytes: int = 5 * PIECE_BYTES) -> np.ndarray:
    """Several pieces."""
    return rng.standard_normal((nbytes // 4096, 1024)).astype(np.float32)


def test_cupy_has_all_that_stands_in_for_its_own() -> None:
    theirs = {"_Device": cupy.cuda.Device, "_Stream": cupy.cuda.Stream, "_MemoryPool": cupy.cuda.MemoryPool}
    theirs |= {"_MemoryPointer": cupy.cuda.MemoryPointer, "_Module": cupy.RawModule, "_Event": cupy.cuda.Event}
    own = {"_Event": {"time"}, "_Stream": {"owner", "put"}, "_Device": {"owner"}, "_MemoryPool": {"owner"}}
    for name, their in theirs.items():
        mine = {n for n in vars(getattr(fiber_cuda, name)) if not n.startswith("_")} - own.get(name, set())
        assert mine <= set(dir(their)), name
    for name in ("getDeviceCount", "getDeviceProperties", "hostAllocPortable", "CUDARuntimeError"):
        assert hasattr(cupy.cuda.runtime, name), name
    assert {"id", "compute_capability", "pci_bus_id", "__enter__"} <= set(dir(cupy.cuda.Device))
    assert {"ptr"} <= set(dir(cupy.cuda.MemoryPointer))
    assert "path" in cupy.RawModule.__doc__
    assert "limit" in cupy.cuda.MemoryPool.set_limit.__doc__
    for copy in ("copy_from_host_async", "copy_to_host_async"):
        assert "(self, mem, size_t size, stream=None)" in getattr(cupy.cuda.MemoryPointer, copy).__doc__
    assert "(self, MemoryPointer src, size_t size," in cupy.cuda.MemoryPointer.copy_from_device_async.__doc__
    assert "(self, stream=None)" in str(inspect.signature(cupy.cuda.Event.record))
    assert "(self, int value, size_t size, stream=None)" in cupy.cuda.MemoryPointer.memset_async.__doc__


def test_cupys_compiler_makes_a_whole_file() -> None:
    cubin = compile_source("dequantize", "sm_80")
    assert cubin.startswith(b"\x7fELF")
    headers, size, count = (int.from_bytes(cubin[at:end], "little") for at, end in ((32, 40), (54, 56), (56, 58)))
    sections, section_size, sections_count = (
        int.from_bytes(cubin[at:end], "little") for at, end in ((40, 48), (58, 60), (60, 62))
    )
    assert len(cubin) == max(headers + size * count, sections + section_size * sections_count)


def test_without_a_compiler_it_is_said_what_is_missing(cuda: FiberCuda) -> None:
    cuda.cuda.nvrtc = SimpleNamespace(getVersion=lambda: load_nvidia_dynamic_lib("nvrtc_of_no_release"))
    assert "no NVRTC" in str(CudaBackend.unavailable())
    assert device_count() == 0


def test_without_a_device_it_is_said_so(cuda: FiberCuda) -> None:
    cuda.cuda.runtime.getDeviceCount = lambda: 0
    assert why_not() == "CUDA finds no device"
    assert device_count() == 0


def test_it_is_looked_once_what_there_is(cuda: FiberCuda) -> None:
    assert why_not() is None
    cuda.cuda.runtime.getDeviceCount = lambda: 0
    assert why_not() is None
    assert device_count() == 2


@pytest.mark.usefixtures("look_again")
@pytest.mark.parametrize(
    "broken",
    [
        "import no_such_part",
        "raise OSError('a library is missing')",
        "None.part",
        "half of a",
        "int('numpy.dtype')",
        "{}[1]",
    ],
)
def test_a_cupy_that_cannot_be_imported_is_a_reason_and_no_failure(
    broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cupy.py").write_text(broken)
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.syspath_prepend(tmp_path)
    assert str(CudaBackend.unavailable()).startswith("CuPy cannot be imported (")
    assert CudaBackend.lanes() == 1
    assert choose_backend("auto") == "cpu"


def test_pieces_go_through_three_streams_so_that_transfers_and_kernels_overlap(cuda: FiberCuda, rng) -> None:
    x = weights(rng)
    q = CudaBackend(2).quantize(x, SCHEME, MinMax())
    assert_same(q, REFERENCE.quantize(x, SCHEME, MinMax()))
    pieces = Counter(what for what, _ in cuda.log)["upload"]
    assert pieces == 5
    first_wait = cuda.log.index(("wait", cuda.log[0][1]))
    assert [what for what, _ in cuda.log[:first_wait]] == ["upload", "kernel", "download"] * SLOTS
    assert len({stream for _, stream in cuda.log}) == SLOTS
    # While one piece is waited for, as many others as there are have been sent.
    begun = ended = 0
    for what, _ in cuda.log:
        begun += what == "download"
        ended += what == "wait"
        if what == "wait":
            assert begun - ended + 1 == min(SLOTS, pieces - ended + 1)


@pytest.mark.usefixtures("cuda")
def test_what_a_call_begins_it_also_ends_before_the_next_one_takes_its_buffers(rng) -> None:
    backend, xs = CudaBackend(2), [weights(rng, PIECE_BYTES * n // 2) for n in (1, 4, 3)]
    for x in xs:
        q = backend.quantize(x, SCHEME, MinMax())
        assert_same(q, REFERENCE.quantize(x, SCHEME, MinMax()))
        assert np.array_equal(backend.dequantize(q), REFERENCE.dequantize(q))
        assert np.array_equal(backend.observe(x).counts, REFERENCE.observe(x).counts)


def test_no_more_memory_than_allowed_is_taken_of_the_device_or_pinned_beside_it(cuda: FiberCuda, rng) -> None:
    limit = 6 << 20
    backend, x = CudaBackend(1, limit), weights(rng)
    most = []
    put = cuda.log.append

    class Log(list):
        """Looks at the memory whenever something happens."""

        def append(self, entry: tuple[str, int]) -> None:
            """See `list.append`."""
            most.append(cuda.pinned_bytes)
            put(entry)

    cuda.log = Log()
    assert_same(backend.quantize(x, SCHEME, MinMax()), REFERENCE.quantize(x, SCHEME, MinMax()))
    assert 0 < max(most) <= limit
    (notice,) = backend.take_notices()
    assert "has not enough memory for" in notice
    assert backend.lost_devices() == {}


def test_without_memory_to_pin_smaller_pieces_are_taken(cuda: FiberCuda, rng) -> None:
    cuda.pinned_limit = 6 << 20
    backend, x = CudaBackend(1), weights(rng)
    assert_same(backend.quantize(x, SCHEME, MinMax()), REFERENCE.quantize(x, SCHEME, MinMax()))
    assert "has not enough memory for" in backend.take_notices()[0]


def test_a_device_that_falls_off_the_bus_is_lost_and_the_other_one_goes_on(cuda: FiberCuda, rng) -> None:
    backend, x = CudaBackend(1), weights(rng, PIECE_BYTES)
    assert CudaBackend.lanes() == 2
    cuda.failing = {1}
    for _ in range(2):
        assert_same(backend.quantize(x, SCHEME, MinMax()), REFERENCE.quantize(x, SCHEME, MinMax()))
    assert list(backend.lost_devices()) == ["Fibers 1"]
    assert "cudaErrorIllegalAddress" in backend.lost_devices()["Fibers 1"]
    cuda.failing = {0, 1}
    assert_same(backend.quantize(x, SCHEME, MinMax()), REFERENCE.quantize(x, SCHEME, MinMax()))
    assert sorted(backend.lost_devices()) == ["Fibers 0", "Fibers 1"]
    assert ["another device" in n or "the CPU goes on" in n for n in backend.take_notices()] == [True, True]


def test_a_device_that_lacks_memory_and_then_fails_is_lost_like_any_other(cuda: FiberCuda, rng) -> None:
    backend, x = CudaBackend(1, 1 << 20), weights(rng, PIECE_BYTES)
    cuda.fails_when_full = True
    assert_same(backend.quantize(x, SCHEME, MinMax()), REFERENCE.quantize(x, SCHEME, MinMax()))
    assert sorted(backend.lost_devices()) == ["Fibers 0", "Fibers 1"]
