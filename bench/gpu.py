"""Kernels, transfers and the pipeline on a GPU, beside a copy on the card: `make bench-gpu`; refuses without one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench.charts import Bar, Chart
from bench.common import GB, MIB, RESULTS, Samples, cores, measure, note, table, write_result
from bench.gpu_card import Card, Rates
from bench.gpu_peers import GPU_PEERS, measured
from bench.peers import Peer
from service.engine.backends.cpu import CpuBackend
from service.engine.backends.cpu_form import Form
from service.engine.backends.cuda import CudaBackend
from service.engine.backends.cuda_many import QuantizeMany
from service.engine.backends.cuda_pieces import Compare, Dequantize, Observe, Quantize
from service.engine.backends.work import Work
from service.engine.buffers import Buffers
from service.engine.methods.base import Method
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.schemes.base import Scheme
from service.engine.schemes.codebook import CodebookScheme
from service.engine.schemes.integer import IntegerScheme

SCHEMES: dict[str, Scheme] = {"int4": IntegerScheme(), "int8": IntegerScheme(bits=8), "nf4": CodebookScheme()}
DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
#: Shares of a copy on the card, and of the pinned upload. Kernels measure errors on the way.
KERNEL_MARK, PIPELINE_MARK = 0.75, 0.9

ABOUT = """
Weights drawn from a normal distribution, {size} MiB in {columns} columns. *Kernel* is the time between two events on
the card around the launches alone, GB/s counts what is read and written, and *of copy* is the share of a copy on the
card, which counts both as well. All kernels that quantize measure errors and check for finite values in the same pass;
the mark of {kernel_mark} is for `minmax` so. *Pipeline* is a whole call, from memory of this machine and back; its GB/s
count the source, the share is of the pinned upload, and the mark of {pipeline_mark} is for `mse`. *J/GB* is what the
driver counts for the card, over a second of calls. *Small tensors* are {small} KiB each, in one call; *of one* is the
rate beside that of the same bytes as one tensor. Of the others GB/s count the source, which lies on the card.
"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the weights, of those that others get, and of a small tensor with how many there are of them.

    And in how many columns weights lie, and how often launches and whole calls are repeated.
    """

    weights: int = 256 * MIB
    others: int = 64 * MIB
    small: int = 4096
    many: int = 16384
    columns: int = 4096
    launches: int = 20
    calls: int = 5


WHOLE = Sizes()


def weights(dtype: np.dtype[Any], nbytes: int, columns: int) -> np.ndarray:
    """Random weights of so many bytes; some of them, repeated."""
    rows = nbytes // (columns * dtype.itemsize)
    some = np.random.default_rng(0).standard_normal((min(rows, 512), columns)).astype(dtype)
    return np.tile(some, (-(-rows // len(some)), 1))[:rows]


def verdict(share: float, mark: float | None) -> str:
    """Whether a mark is reached, where there is one."""
    return "" if mark is None else f"{mark} {'met' if share >= mark else 'missed'}"


@dataclass(frozen=True, slots=True)
class Line:
    """A measured rate, as a share of what bounds it."""

    name: str
    dtype: str
    rate: float
    share: float
    mark: float | None
    spread: float
    joules_per_gb: float | None = None

    def cells(self) -> list[str]:
        """Of a table."""
        share = f"{self.share:.2f}"
        return [self.name, self.dtype, f"{self.rate:.1f}", share, verdict(self.share, self.mark), f"{self.spread:.2f}"]

    def bar(self) -> Bar:
        """Of a chart."""
        return Bar(f"{self.name}, {self.dtype}", self.share, mark=self.mark)


def works(dtype: np.dtype[Any], sizes: Sizes) -> Iterator[tuple[str, Work, float | None]]:
    """Every kind of kernel, with the mark that it has."""
    x, buffers, host = weights(dtype, sizes.weights, sizes.columns), Buffers(), CpuBackend
    methods: tuple[tuple[Method, float | None], ...] = ((MinMax(), KERNEL_MARK), (Mse(), None))
    for name, scheme in SCHEMES.items():
        for method, mark in methods:
            coding = Quantize(x, Form(scheme, *x.shape), method, None, buffers, host)
            yield f"{name} {method.id}", coding.work(0, len(x)), mark
    cuda = CudaBackend(cores())
    for name, scheme in SCHEMES.items():
        decoding = Dequantize(cuda.quantize(x, scheme, MinMax()), buffers, host)
        yield f"{name} dequantize, to float32", decoding.work(0, len(x)), None
    yield "compare", Compare(x, x, host).work(0, len(x)), None
    yield "observe", Observe(x, host).work(0, len(x)), None
    many = QuantizeMany(small(dtype, sizes), SCHEMES["int4"], MinMax(), host)
    yield f"int4 minmax, {sizes.many} small tensors", many.work(0, many.total), None


def small(dtype: np.dtype[Any], sizes: Sizes) -> list[np.ndarray]:
    """Many tensors."""
    x = weights(dtype, sizes.small * sizes.many, sizes.columns).reshape(sizes.many, 16, -1)
    return list(x)


def kernels(card: Card, copy_rate: float, sizes: Sizes) -> Iterator[Line]:
    """What the launches alone take."""
    for dtype in DTYPES:
        for name, work, mark in works(dtype, sizes):
            note(f"{name} from {dtype}")
            samples = card.launched(work, sizes.launches)
            rate = (work.input_bytes + work.output_bytes) / samples.median / GB
            yield Line(name, str(dtype), rate, rate / copy_rate, mark, samples.spread)


def pipeline(card: Card, upload_rate: float, sizes: Sizes) -> Iterator[Line]:
    """What whole calls take."""
    cuda = CudaBackend(cores())
    methods: tuple[tuple[Method, float | None], ...] = ((MinMax(), None), (Mse(), PIPELINE_MARK))
    for dtype in DTYPES:
        x = weights(dtype, sizes.weights, sizes.columns)
        for name, scheme in SCHEMES.items():
            for method, mark in methods:
                note(f"pipeline: {name} {method.id} from {dtype}")

                def call(x: np.ndarray = x, scheme: Scheme = scheme, method: Method = method) -> object:
                    return cuda.quantize(x, scheme, method)

                samples = measure(call, repeats=sizes.calls)
                rate, joules = x.nbytes / samples.median / GB, card.joules(call)
                per_gb = None if joules is None else joules / x.nbytes * GB
                yield Line(f"{name} {method.id}", str(dtype), rate, rate / upload_rate, mark, samples.spread, per_gb)


def many(sizes: Sizes) -> Iterator[list[str]]:
    """Rows of the table of small tensors."""
    cuda = CudaBackend(cores())
    for dtype in DTYPES:
        xs = small(dtype, sizes)
        whole = np.concatenate(xs)
        for method in (MinMax(), Mse()):
            note(f"{len(xs)} small tensors: {method.id} from {dtype}")
            scheme = SCHEMES["int4"]
            one = measure(lambda w=whole, m=method, s=scheme: cuda.quantize(w, s, m), repeats=sizes.calls)
            together = measure(lambda x=xs, m=method, s=scheme: cuda.quantize_many(x, s, m), repeats=sizes.calls)
            rate, share = whole.nbytes / together.median / GB, one.median / together.median
            yield [f"int4 {method.id}", str(dtype), f"{rate:.2f}", f"{share:.2f}", f"{together.spread:.2f}"]


def others(sizes: Sizes, peers: Sequence[Peer], device: str = "cuda") -> Iterator[list[str]]:
    """Rows of the table of what others do."""
    for dtype in DTYPES:
        for peer, size, samples in measured(peers, weights(dtype, sizes.others, sizes.columns), device, sizes.calls):
            note(f"{peer.name} from {dtype}")
            yield [peer.name, str(dtype), *_rate(size, samples)]


def _rate(nbytes: int, samples: Samples | None) -> list[str]:
    return ["not here", ""] if samples is None else [f"{nbytes / samples.median / GB:.3g}", f"{samples.spread:.2f}"]


def _energy(line: Line) -> str:
    return "not told" if line.joules_per_gb is None else f"{line.joules_per_gb:.2f}"


def _tables(card: Card, rates: Rates, sizes: Sizes, peers: Sequence[Peer]) -> tuple[list[str], list[Chart]]:
    moved = [["copy on the card", rates.copy], ["pinned upload", rates.upload], ["pinned download", rates.download]]
    on_card = list(kernels(card, rates.copy, sizes))
    calls = list(pipeline(card, rates.upload, sizes))
    head = ["input", "GB/s", "of copy", "mark", "spread"]
    tables = [
        table(["transfer", "GB/s"], [[name, f"{rate:.1f}"] for name, rate in moved]),
        table(["kernel", *head], [line.cells() for line in on_card]),
        table(
            ["pipeline", "input", "GB/s", "of upload", "mark", "spread", "J/GB"],
            [[*line.cells(), _energy(line)] for line in calls],
        ),
        table(["small tensors", "input", "GB/s", "of one", "spread"], many(sizes)),
        table(["others", "input", "GB/s", "spread"], others(sizes, peers)),
    ]
    charts = [
        Chart("Kernels", "share of a copy on the card", [line.bar() for line in on_card]),
        Chart("Pipeline", "share of the pinned upload", [line.bar() for line in calls]),
    ]
    return tables, charts


def main(sizes: Sizes = WHOLE, peers: Sequence[Peer] = GPU_PEERS, folder: Path = RESULTS) -> int:
    """Measure all and write `gpu-<card>.md` in a folder."""
    if reason := CudaBackend.unavailable():
        print(f"no GPU to measure: {reason}", file=sys.stderr)
        return 1
    card = Card(cores())
    note("transfers")
    tables, charts = _tables(card, card.rates(sizes.weights, sizes.launches), sizes, peers)
    about = ABOUT.format(
        size=sizes.weights // MIB,
        columns=sizes.columns,
        kernel_mark=KERNEL_MARK,
        pipeline_mark=PIPELINE_MARK,
        small=sizes.small // 1024,
    )
    name = re.sub(r"[^a-z0-9]+", "-", card.name.lower()).strip("-")
    packages = ["numpy", "cupy-cuda12x", *sorted({peer.package for peer in peers})]
    write_result(f"gpu-{name}", card.name, about, *tables, packages=packages, charts=charts, folder=folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
