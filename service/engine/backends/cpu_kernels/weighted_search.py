"""`Mse` where columns have weights: as `search`, with the weights of each lane's group beside its elements.

Sums are weighted, and the sum of the weights stands where the number of elements does. A lane's weights have to lie in
the lane, for sixteen groups may be of as many columns.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit
from numba.core import types

from service.engine.backends.cpu_kernels.caching import kernel
from service.engine.backends.cpu_kernels.fixed import widen_range
from service.engine.backends.cpu_kernels.grids import FORM, Form
from service.engine.backends.cpu_kernels.search import (
    BEST_ERROR,
    BEST_SCALE,
    BEST_ZERO,
    HIGH,
    LOW,
    MEAN,
    STARTS,
    TOTAL,
    Lanes,
    go_on,
    in_floats,
    spread,
    take_first,
)
from service.engine.backends.cpu_kernels.spans import SPAN, address_of, as_f32, whole_vectors
from service.engine.backends.cpu_kernels.vector import F32, F64, I64, LANES, Memory, State, emitted, loop, zeros

_P, _F = types.intp, types.float32


@emitted(types.none, _P, _P, _P, _P, *FORM)
def begin(builder, source, weights, count, lanes, divisor, top, implied, symmetric, scale_kind, under):
    """The sums of the weights, into TOTAL, and the weighted means; and the grid of the whole range is the best yet."""
    state, form = Lanes(builder, lanes), Form.of(builder, (divisor, top, implied, symmetric, scale_kind, under))
    x, w = Memory(builder, source, F32), Memory(builder, weights, F32)

    def step(i: ir.Value, sums: State) -> State:
        at = builder.mul(i, ir.Constant(I64, LANES))
        weight = w.load(at).widen(F64)
        return [sums[0] + weight, sums[1] + weight * x.load(at).widen(F64)]

    total, products = loop(builder, count, 1, [zeros(builder, F64), zeros(builder, F64)], step)
    state[TOTAL], state[MEAN] = total, (products / total).to_single()
    state[BEST_SCALE], state[BEST_ZERO], _ = form.grid(state[LOW], state[HIGH])
    state[BEST_ERROR] = zeros(builder, F64).const(float("inf"))


@emitted(types.boolean, _P, _P, _P, _P, _P, _F, _F, _P, *FORM)
def advance(
    builder, source, weights, count, lanes, clips, starts, steps, table,
    divisor, top, implied, symmetric, scale_kind, under,
):  # fmt: skip
    """As `search.advance`."""
    state, form = Lanes(builder, lanes), Form.of(builder, (divisor, top, implied, symmetric, scale_kind, under))
    found = in_floats(state, source, count, state[TOTAL].to_single(), form, table, weights)
    return go_on(state, found, clips, starts, steps, form)


@njit(nogil=True)
def _load(x, kind, first, size, column, weights, source, beside, lane, lanes, scratch):
    """A group and its weights, those of columns from `column` on, into a lane."""
    low, high = lanes + 4 * (LANES * LOW + lane), lanes + 4 * (LANES * HIGH + lane)
    for start in range(0, size, SPAN):
        n = min(SPAN, size - start)
        span = as_f32(x, kind, first + start, n, scratch)
        spread(span, n, source + 4 * (LANES * start + lane))
        widen_range(span, whole_vectors(n), low, high)
    spread(weights + 4 * column, size, beside + 4 * lane)


@kernel
def search_weighted_grids(
    x, kind, cols, first_row, last_row, row_groups, group, first_group, last_group, size, weights,
    clips, iterations, table, form, scale, zero, transposed, span_buffer, lane_state,
):  # fmt: skip
    """What `search.search_grids` does, with `weights` (cols,) of the columns.

    `transposed` holds twice size * LANES float32, `lane_state` `search.LANE_STATE`.
    """
    source, scratch, lanes = address_of(transposed), address_of(span_buffer), address_of(lane_state)
    beside, of_columns = source + 4 * LANES * size, address_of(weights)
    in_row = last_group - first_group
    total = (last_row - first_row) * in_row
    for lot in range(0, total, LANES):
        lane_state[:] = 0.0
        for lane in range(LANES):
            index = min(lot + lane, total - 1)
            row = index // in_row
            column = (first_group + index - row * in_row) * group
            first = (first_row + row) * cols + column
            _load(x, kind, first, size, column, of_columns, source, beside, lane, lanes, scratch)
        begin(source, beside, size, lanes, *form)
        for number in range(clips.shape[0]):
            starts, steps = clips[number, 2 * STARTS], min(clips[number, 2 * STARTS + 1], iterations)
            address = address_of(clips[number])
            take_first(lanes, address, *form)
            while advance(source, beside, size, lanes, address, starts, steps, table, *form):
                pass
        for lane in range(min(LANES, total - lot)):
            index = lot + lane
            g = (first_row + index // in_row) * row_groups + first_group + index % in_row
            scale[g], zero[g] = lane_state[BEST_SCALE * LANES + lane], lane_state[BEST_ZERO * LANES + lane]
