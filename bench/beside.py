"""Our kernels beside what other libraries do with the same weights in the same run: `make bench-peers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.common import MIB, Samples, measure
from bench.kernel_marks import BESIDE_OTHERS
from bench.kernels import (
    BLOCK,
    COLUMNS,
    DTYPES,
    INT4,
    INT8,
    LARGE,
    OURS,
    Line,
    gathered,
    page,
    quantize_line,
    ready_backend,
    weights,
)
from bench.peers import PEERS, prepared
from service.engine.backends.base import Backend
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse

ABOUT = f"""
Weights drawn from a normal distribution, {COLUMNS} columns; GB/s is bytes of input by the median time, *of copy* the
share of a copy of memory by as many threads, *spread* the distance between the quartiles as a share of the median.
Ours gets {LARGE // MIB} MiB at once, the search and all others {BLOCK // MIB} MiB, slow ones less. int4 and int8 are
asymmetric in groups of 128 with scales in F16. Ours packs, measures all errors and checks for finite values in the same
pass; others only pack, or not even that. ggml is its C library, called from as many threads as there are cores.
"""


def ours(cpu: Backend) -> Iterator[Line]:
    """What is compared."""
    for dtype in DTYPES:
        yield quantize_line(cpu, f"{OURS}int4 minmax", dtype, LARGE, INT4, MinMax(), 5)
        yield quantize_line(cpu, f"{OURS}int8 minmax", dtype, LARGE, INT8, MinMax(), 5)
        yield quantize_line(cpu, f"{OURS}int4 mse, 16 starts", dtype, BLOCK, INT4, Mse(), 3)


def others() -> Iterator[Line]:
    """Peers, on less."""
    for dtype in DTYPES:
        x = weights(dtype, BLOCK)
        for peer, call in prepared(x):
            yield Line(peer.name, dtype, x.nbytes // peer.share, _measured(call))


def _measured(call: Callable[[], object] | None) -> Samples | None:
    return None if call is None else measure(call, repeats=3)


def main() -> None:
    """Measure all and write `results/beside.md`."""
    lines = gathered(ours(ready_backend()), others())
    packages = ["numpy", "numba", *sorted({peer.package for peer in PEERS} - {"numpy"})]
    page("beside", "Kernels beside others", ABOUT, BESIDE_OTHERS, lines, packages)


if __name__ == "__main__":
    main()
