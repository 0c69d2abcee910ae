"""Kernels, transfers and the pipeline on a GPU, beside a copy on the card: `make bench-gpu`; refuses without one."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.common import GB, MIB, Samples, cores, measure, note, table, write_result
from service.engine.backends.cuda import CudaBackend
from service.engine.backends.cuda_pieces import quantize_work
from service.engine.backends.cupy_device import CupyDevice
from service.engine.backends.work import THREADS, Work
from service.engine.methods.base import Method
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.schemes.base import Scheme
from service.engine.schemes.codebook import CodebookScheme
from service.engine.schemes.integer import IntegerScheme

COLUMNS, LARGE = 4096, 256 * MIB
SCHEMES: dict[str, Scheme] = {"int4": IntegerScheme(), "int8": IntegerScheme(bits=8), "nf4": CodebookScheme()}

ABOUT = """
Weights drawn from a normal distribution, 4096 columns. *Kernel* is the time between two events on the card around the
launches alone, GB/s counts what is read and written, and *of copy* is the share of a copy on the card, which counts
both as well. All kernels measure errors and check for finite values in the same pass. *Pipeline* is a whole call, from
memory of this machine and back; its GB/s count the source, and the share is of the pinned upload.
"""


def weights(dtype: np.dtype[Any]) -> np.ndarray:
    """LARGE bytes."""
    some = np.random.default_rng(0).standard_normal((512, COLUMNS)).astype(dtype)
    return np.tile(some, (LARGE // some.nbytes, 1))


def on_card(cupy: Any, launch: Callable[[], object], repeats: int = 20) -> Samples:
    """Seconds between two events around a launch."""
    times = []
    for turn in range(repeats + 3):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        launch()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return Samples(tuple(times))


def launched(cupy: Any, device: CupyDevice, work: Work) -> Samples:
    """A piece of work whose inputs are on the card."""
    host = np.empty(work.input_bytes, np.uint8)
    work.fill(host)
    read, written = cupy.asarray(host), cupy.empty(work.output_bytes, np.uint8)
    task = work.task(read.data.ptr, written.data.ptr)
    kernels = [(device.kernel(one.source, one.kernel), one.blocks) for one in work.launches]

    def launch() -> None:
        for kernel, blocks in kernels:
            kernel((blocks,), (THREADS,), (task,))

    return on_card(cupy, launch)


def kernels(cupy: Any, device: CupyDevice, copy_rate: float) -> Iterator[list[str]]:
    """Rows of the table of kernels."""
    import ml_dtypes

    for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        x = weights(dtype)
        for name, scheme in SCHEMES.items():
            for method in (MinMax(), Mse()):
                note(f"{name} {method.id} from {dtype}")
                work = quantize_work(x, scheme, method)
                samples = launched(cupy, device, work)
                rate = (work.input_bytes + work.output_bytes) / samples.median / GB
                share = f"{rate / copy_rate:.2f}"
                yield [f"{name} {method.id}", str(dtype), f"{rate:.0f}", share, f"{samples.spread:.2f}"]


def pipeline(upload_rate: float) -> Iterator[list[str]]:
    """Rows of the table of whole calls."""
    import ml_dtypes

    cuda, x = CudaBackend(cores()), weights(np.dtype(ml_dtypes.bfloat16))
    methods: tuple[Method, ...] = (MinMax(), Mse())
    for name, scheme in SCHEMES.items():
        for method in methods:
            note(f"pipeline: {name} {method.id}")
            samples = measure(lambda s=scheme, m=method: cuda.quantize(x, s, m), repeats=5, warm_up=2)
            rate = x.nbytes / samples.median / GB
            yield [f"{name} {method.id}", f"{rate:.1f}", f"{rate / upload_rate:.2f}", f"{samples.spread:.2f}"]


def transfers(cupy: Any) -> dict[str, float]:
    """GB/s of a copy on the card, of both its sides, and of pinned transfers."""
    a, b = cupy.ones(LARGE, np.uint8), cupy.ones(LARGE, np.uint8)
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(LARGE), np.uint8, LARGE)
    return {
        "copy on the card": 2 * LARGE / on_card(cupy, lambda: cupy.copyto(b, a)).median / GB,
        "pinned upload": LARGE / on_card(cupy, lambda: a.set(pinned)).median / GB,
        "pinned download": LARGE / on_card(cupy, lambda: a.get(out=pinned)).median / GB,
    }


def main() -> int:
    """Measure all and write `results/gpu-<card>.md`."""
    if reason := CudaBackend.unavailable():
        print(f"no GPU to measure: {reason}", file=sys.stderr)
        return 1
    import cupy

    device = CupyDevice(0, 0, cores())
    rates = transfers(cupy)
    head = ["kernel", "input", "GB/s", "of copy", "spread"]
    kernel_table = table(head, kernels(cupy, device, rates["copy on the card"]))
    pipeline_table = table(["pipeline", "GB/s", "of upload", "spread"], pipeline(rates["pinned upload"]))
    moved = table(["transfer", "GB/s"], [[name, f"{rate:.1f}"] for name, rate in rates.items()])
    card = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    write_result(
        f"gpu-{card}", device.name, ABOUT, moved, kernel_table, pipeline_table, packages=["numpy", "cupy-cuda12x"]
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
