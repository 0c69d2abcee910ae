"""Kernels in GB/s of input, beside a copy of memory, the reference and plain NumPy: `python -m bench.kernels`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import ml_dtypes
import numpy as np

from bench.charts import Bar, Chart
from bench.common import GB, MIB, Samples, cores, measure, note, table, write_result
from bench.kernel_marks import ABOUT_MARKS, BESIDE_COPY, Mark
from bench.peers import Array, naive_int4
from service.engine.backends.base import Backend
from service.engine.backends.cpu import CpuBackend
from service.engine.backends.reference import ReferenceBackend
from service.engine.methods.base import Method
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.schemes.base import Scheme
from service.engine.schemes.codebook import CodebookScheme
from service.engine.schemes.integer import IntegerScheme

#: More than the last-level cache of most machines.
LARGE, BLOCK, SMALL = 512 * MIB, 64 * MIB, 8 * MIB
COLUMNS = 4096
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
OURS = "**cpu**: "
ANY = "any"
INT4, INT8, NF4 = IntegerScheme(), IntegerScheme(bits=8), CodebookScheme()

ABOUT = f"""
Weights drawn from a normal distribution, {COLUMNS} columns; GB/s is bytes of input by the median time (of `dequantize`:
bytes of its F32 output; of `compare`: bytes of both sides), *of copy* the share of `np.copyto` into pages already in
use, split over the same number of threads, *spread* the distance between the quartiles as a share of the median. A
call gets {BLOCK // MIB} MiB of weights, or what became of as many, as in a run, until the size is done; slow ones get
less. int4 and int8 are asymmetric in groups of 128, nf4 has groups of 64; scales are F16. Ours packs, measures all
errors and checks for finite values in the same pass; NumPy's six lines only pack.
"""


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table; `samples` is None for what is absent."""

    name: str
    dtype: str
    nbytes: int
    samples: Samples | None

    @property
    def rate(self) -> float | None:
        """GB/s."""
        return None if self.samples is None else self.nbytes / self.samples.median / GB

    def cells(self, copy_rate: float) -> list[str]:
        """As text, beside the copy of this run."""
        if self.samples is None or self.rate is None:
            return [self.name, self.dtype, "", "absent", "", ""]
        return [
            self.name, self.dtype, f"{self.nbytes / MIB:.0f} MiB", f"{self.rate:.3g}", f"{self.rate / copy_rate:.3f}",
            f"{self.samples.spread:.2f}",
        ]  # fmt: skip


@lru_cache(maxsize=1)
def weights(dtype: str, nbytes: int) -> Array:
    """Random weights of so many bytes; a few MiB of them, repeated."""
    some = np.random.default_rng(0).standard_normal((1024, COLUMNS)).astype(DTYPES[dtype])
    return np.tile(some, (-(-nbytes // some.nbytes), 1))[: nbytes // (COLUMNS * some.itemsize)]


def copy(x: Array, threads: int) -> Samples:
    """Memory to memory, each thread its share."""
    target = np.ones_like(x)
    shares = [slice(len(x) * i // threads, len(x) * (i + 1) // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return measure(lambda: list(pool.map(lambda s: np.copyto(target[s], x[s]), shares)), repeats=9, warm_up=2)


def quantize_line(
    backend: Backend, what: str, dtype: str, nbytes: int, scheme: Scheme, method: Method, repeats: int
) -> Line:
    """One scheme and method on one backend, by blocks, as a run does it: what came of one is let go of for the next."""
    x = weights(dtype, nbytes)
    rows = max(1, len(x) * BLOCK // x.nbytes)

    def run() -> None:
        for at in range(0, len(x), rows):
            backend.quantize(x[at : at + rows], scheme, method)

    return Line(what, dtype, x.nbytes, measure(run, repeats=repeats))


def ours(cpu: Backend) -> Iterator[Line]:
    """The cpu backend on tensors larger than the cache."""
    for dtype in DTYPES:
        for name, scheme in (("int4", INT4), ("int8", INT8), ("nf4", NF4)):
            yield quantize_line(cpu, f"{OURS}{name} minmax", dtype, LARGE, scheme, MinMax(), 5)
        yield quantize_line(cpu, f"{OURS}int4 mse, 16 starts", dtype, BLOCK, INT4, Mse(), 3)
        x = weights(dtype, LARGE // 2)
        rows = len(x) * BLOCK // x.nbytes
        parts = [cpu.quantize(x[at : at + rows], INT4, MinMax()) for at in range(0, len(x), rows)]
        decoded = measure(lambda parts=parts: [cpu.dequantize(q).size for q in parts], repeats=5)
        yield Line(f"{OURS}int4 dequantize", dtype, 4 * x.size, decoded)
        y = x.copy()
        yield Line(f"{OURS}compare", dtype, 2 * x.nbytes, measure(lambda x=x, y=y: cpu.compare(x, y), repeats=5))


def reference() -> Iterator[Line]:
    """What the kernels are held to."""
    backend = ReferenceBackend()
    for dtype in DTYPES:
        yield quantize_line(backend, "reference: int4 minmax", dtype, SMALL, INT4, MinMax(), 3)
        yield quantize_line(backend, "reference: int4 mse, 16 starts", dtype, SMALL // 4, INT4, Mse(), 1)


def plain() -> Iterator[Line]:
    """What anybody would write."""
    for dtype in DTYPES:
        x = weights(dtype, BLOCK)
        yield Line("NumPy, the obvious six lines: int4", dtype, x.nbytes, measure(lambda x=x: naive_int4(x), repeats=3))


def marks(known: Sequence[Mark], lines: Sequence[Line], copy_rate: float) -> str:
    """What is to be reached, and what was."""
    rates = {(line.name.removeprefix(OURS), line.dtype): line.rate for line in lines}
    rows = []
    for mark in known:
        for dtype, needed in mark.needed.items():
            ours, other = rates[mark.what, dtype], rates[mark.beside, dtype] if mark.beside else copy_rate
            assert ours is not None
            reached = None if other is None else ours / other
            rows.append([mark.what, dtype, mark.beside or "copy of memory", *mark.verdict(needed, reached)])
    return table(["what", "input", "beside", "needed", "reached", "", "what limits it"], rows)


def chart(lines: Sequence[Line]) -> Chart:
    """All rates from F32."""
    shown = [line for line in lines if line.dtype in ("F32", ANY)]
    bars = [Bar(line.name.replace("**", ""), line.rate, line.name.startswith(OURS)) for line in shown if line.rate]
    return Chart("From F32 weights", "GB/s", bars, logarithmic=True)


def copied() -> Line:
    """The copy of memory that all is compared with."""
    note("copy of memory")
    return Line("copy of memory", ANY, LARGE, copy(weights("F32", LARGE), cores()))


def ready_backend() -> CpuBackend:
    """Ours, on all cores, with nothing left to compile."""
    cpu = CpuBackend(cores())
    cpu.warm_up()
    return cpu


def gathered(*parts: Iterable[Line]) -> list[Line]:
    """Lines as they come, each told of."""
    lines = []
    for line in chain(*parts):
        note(f"{line.name}, {line.dtype}")
        lines.append(line)
    return lines


def page(name: str, title: str, about: str, known: Sequence[Mark], lines: list[Line], packages: Sequence[str]) -> None:
    """Write the page of some lines, beside a copy measured just now."""
    memory = copied()
    assert memory.rate is not None
    lines = [memory, *lines]
    head = ["what", "input", "size", "GB/s", "of copy", "spread"]
    cells = [line.cells(memory.rate) for line in lines]
    write_result(
        name, f"{title}, {cores()} threads", ABOUT_MARKS, marks(known, lines, memory.rate), about, table(head, cells),
        packages=packages, charts=[chart(lines)],
    )  # fmt: skip


def main() -> None:
    """Measure all and write `results/kernels.md`."""
    lines = gathered(ours(ready_backend()), reference(), plain())
    page("kernels", "Kernels", ABOUT, BESIDE_COPY, lines, ("numpy", "numba", "llvmlite"))


if __name__ == "__main__":
    main()
