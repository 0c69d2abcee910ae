"""Products of a matrix with a panel: many columns of PANEL numbers each, of as many rows that are solved together."""

from __future__ import annotations

from llvmlite import ir
from numba import njit
from numba.core import types

from service.engine.backends.cpu_kernels.vector import F32, I64, LANES, Memory, State, emitted, loop, processor_has

#: Rows of a panel, and its bytes per column.
PANEL = 4 * LANES
PANEL_BYTES = 4 * PANEL
#: Columns of the result that are held in registers together.
_TOGETHER = 6
#: Vectors of a panel's column that are held with them: all where there are registers enough.
_VECTORS = 4 if processor_has("avx512f") else 1
#: Columns of the panel that stay in the cache while all columns of a result go over them.
_CHUNK = 256

_P = types.intp


def _add(
    builder: ir.IRBuilder, a: ir.Value, stride: ir.Value, b: ir.Value, count: ir.Value, out: ir.Value, columns: int
) -> None:
    factors, panel, result = Memory(builder, a, F32), Memory(builder, b, F32), Memory(builder, out, F32)

    def at(column: int, vector: int) -> ir.Value:
        return ir.Constant(I64, column * PANEL + vector * LANES)

    for first in range(0, PANEL // LANES, _VECTORS):
        vectors = range(first, first + _VECTORS)

        def step(k: ir.Value, state: State, vectors: range = vectors) -> State:
            row = builder.mul(k, ir.Constant(I64, PANEL))
            values = [panel.load(builder.add(row, at(0, v))) for v in vectors]
            following = []
            for c in range(columns):
                where = builder.add(builder.mul(stride, ir.Constant(I64, c)), k)
                factor = factors.load(where, 1).splat()
                following += [value.fma(factor, state[c * len(values) + i]) for i, value in enumerate(values)]
            return following

        places = [at(c, v) for c in range(columns) for v in vectors]
        for place, total in zip(places, loop(builder, count, 1, [result.load(p) for p in places], step), strict=True):
            result.store(place, total)


@emitted(types.none, _P, _P, _P, _P, _P)
def _add_together(builder, a, stride, b, count, out):
    """Add Σ a[c, k] * b[k] over `count` k to `_TOGETHER` columns of `out`; rows of `a` are `stride` apart."""
    _add(builder, a, stride, b, count, out, _TOGETHER)


@emitted(types.none, _P, _P, _P, _P, _P)
def _add_one(builder, a, stride, b, count, out):
    """The same for one column."""
    _add(builder, a, stride, b, count, out, 1)


@njit(nogil=True)
def add_products(a, stride, b, count, out, columns):
    """Add to `columns` columns c of the panel `out` Σ a[c, k] * b[k] over the first `count` columns of panel `b`.

    All are addresses of float32; rows of `a` are `stride` elements apart.
    """
    together = columns // _TOGETHER * _TOGETHER
    for k in range(0, count, _CHUNK):
        n, source, panel = min(_CHUNK, count - k), a + 4 * k, b + PANEL_BYTES * k
        for c in range(0, together, _TOGETHER):
            _add_together(source + 4 * c * stride, stride, panel, n, out + PANEL_BYTES * c)
        for c in range(together, columns):
            _add_one(source + 4 * c * stride, stride, panel, n, out + PANEL_BYTES * c)
