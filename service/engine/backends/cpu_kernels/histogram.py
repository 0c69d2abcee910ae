"""The counts and sums of `service.engine.histogram`, an element at a time."""

from __future__ import annotations

from llvmlite import ir
from numba.core import types

from service.engine.backends.cpu_kernels.caching import kernel
from service.engine.backends.cpu_kernels.spans import SPAN, address_of, as_f32
from service.engine.backends.cpu_kernels.vector import F32, F64, I32, I64, Memory, State, Vec, emitted, loop

_P = types.intp


@emitted(types.none, _P, _P, _P, _P, _P)
def add_to_bins(builder, source, count, counts, sums, extremes):
    """Add `count` float32 to the bins, and widen the extremes (smallest, largest)."""
    x, extreme = Memory(builder, source, F32), Memory(builder, extremes, F32)
    tallies, totals = Memory(builder, counts, I64), Memory(builder, sums, F64)
    first, second = ir.Constant(I64, 0), ir.Constant(I64, 1)

    def step(i: ir.Value, state: State) -> State:
        value = x.load(i, 1)
        pattern = builder.bitcast(value.value, I32)
        index = builder.zext(builder.lshr(pattern, ir.Constant(I32, 16)), I64)
        tally, total = tallies.load(index, 1), totals.load(index, 1)
        tallies.store(index, tally.plus(tally.const(1)))
        totals.store(index, total + Vec(builder, builder.fpext(value.value, F64)))
        return [value.min(state[0]), value.max(state[1])]

    low, high = loop(builder, count, 1, [extreme.load(first, 1), extreme.load(second, 1)], step)
    extreme.store(first, low)
    extreme.store(second, high)


@kernel
def observe_elements(x, kind, first, last, counts, sums, extremes, span_buffer):
    """Add elements [first, last) to the bins."""
    for at in range(first, last, SPAN):
        count = min(SPAN, last - at)
        span = as_f32(x, kind, at, count, address_of(span_buffer))
        add_to_bins(span, count, address_of(counts), address_of(sums), address_of(extremes))
