"""`Mse` on sixteen groups at once, one in each lane; the groups lie transposed in the cache.

One pass over the elements gives the error of a grid and the sums from which the next is fitted. Every lane goes its
own way: where a descent has ended, it takes the next start, while its neighbours go on with theirs. Two lots of groups
take turns: from pass to pass everything waits for the fit, and the other lot's pass fills that time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit
from numba.core import types

from service.engine.backends.cpu_kernels.caching import kernel
from service.engine.backends.cpu_kernels.codes import ROUNDER, nf4_index
from service.engine.backends.cpu_kernels.fixed import add_to_total, fix_group, measure, widen_range
from service.engine.backends.cpu_kernels.grids import FORM, Form
from service.engine.backends.cpu_kernels.minifloats import NF4, NO_TABLE, nearest, of_element
from service.engine.backends.cpu_kernels.spans import SPAN, address_of, as_f32, whole_vectors
from service.engine.backends.cpu_kernels.vector import (
    F32,
    F64,
    I32,
    I64,
    LANES,
    Memory,
    State,
    Vec,
    either,
    emitted,
    loop,
    zeros,
)
from service.engine.schemes.codebook import NF4_TABLE

#: Vectors of float32 that describe a lane: its group's range, unit and mean, the grid to try, start and step, and the
#: best grid so far. Then those of float64: the sum of the group in its units, the error of the grid before this, and of
#: the best; errors may be without Σ x², which is the same for all grids.
LOW, HIGH, UNIT, MEAN, SCALE, ZERO, INVERSE, START, STEP, BEST_SCALE, BEST_ZERO = range(11)
TOTAL, ERROR, BEST_ERROR = range(12, 18, 2)
LANE_STATE = 18 * LANES
#: Lots that take turns, if their groups are so short that all fit the cache.
TURNS, LONGEST_IN_TURNS = 2, 256
#: Starts that lanes are given together: as many as one permutation chooses from.
STARTS = LANES
#: Highest code up to which 16 bits tell elements apart well enough, so that descents go as they would in float32.
LARGEST_IN_FIXED_POINT = 15

_P, _F = types.intp, types.float32


def lots_of_starts(clips: Sequence[tuple[float, float]]) -> npt.NDArray[np.float32]:
    """Starts in lots of STARTS: the low clips of one, the high ones, how many there are, and steps allowed from them.

    The range as it is comes first; if no descent is to start there, alone and with no step.
    """
    pairs = np.array(clips, np.float32).reshape(-1, 2)
    lots = [pairs[at : at + STARTS] for at in range(0, len(pairs), STARTS)]
    whole = np.ones((1, 2), np.float32)
    limits = [np.inf] * len(lots)
    if not len(pairs) or not np.array_equal(pairs[0], whole[0]):
        lots, limits = [whole, *lots], [0.0, *limits]
    table = np.ones((len(lots), 2 * STARTS + 2), np.float32)
    for row, lot, limit in zip(table, lots, limits, strict=True):
        row[: len(lot)], row[STARTS : STARTS + len(lot)] = lot[:, 0], lot[:, 1]
        row[2 * STARTS :] = len(lot), limit
    return table


class Lanes:
    """The vectors of a descent, in memory."""

    def __init__(self, builder: ir.IRBuilder, address: ir.Value) -> None:
        self.narrow, self.wide = Memory(builder, address, F32), Memory(builder, address, F64)

    def __getitem__(self, name: int) -> Vec:
        if name < TOTAL:
            return self.narrow.load(ir.Constant(I64, name * LANES))
        return self.wide.load(ir.Constant(I64, name * LANES // 2))

    def __setitem__(self, name: int, value: Vec) -> None:
        if name < TOTAL:
            self.narrow.store(ir.Constant(I64, name * LANES), value)
        else:
            self.wide.store(ir.Constant(I64, name * LANES // 2), value)


#: What a pass finds of a grid: its error (of a group, always with or always without Σ x²); denominator and numerator of
#: the slope that fits the codes; their mean level.
Found = tuple[Vec, Vec, Vec, Vec]


def in_floats(
    state: Lanes, source: ir.Value, count: ir.Value, size: Vec, form: Form, table: ir.Value,
    weights: ir.Value | None = None,
) -> Found:  # fmt: skip
    """Of elements that are float32: on a table, or on an integer grid of many levels.

    Each counts as much as its weight at `weights`, if there are any, and `size` is then their sum.
    Levels are counted from a center, so that little cancels in the fit, and in steps of the scale like all sums.
    """
    builder, scale, zero, inverse = size.builder, state[SCALE], state[ZERO], state[INVERSE]
    x, nf4 = Memory(builder, source, F32), Vec(builder, ir.Constant(size.type, NF4_TABLE.tolist()))
    none, rounder = zero.const(0.0), zero.const(ROUNDER)
    mean = state[MEAN]
    center = form.either(none, (mean * inverse).rint().max(none - zero).min(form.top - zero))
    origin, lowest, highest = none - center, none - zero - center + rounder, form.top - zero - center + rounder

    def sums(level_of: Callable[[Vec], Vec]) -> State:
        def step(i: ir.Value, state: State) -> State:
            value = x.load(builder.mul(i, ir.Constant(I64, LANES))).fma(inverse, origin)
            level = level_of(value)
            rest = value - level
            if weights is None:
                counted, counted_rest, sum_of_levels = level, rest, state[1] + level
            else:
                weight = Memory(builder, weights, F32).load(builder.mul(i, ir.Constant(I64, LANES)))
                counted, counted_rest, sum_of_levels = weight * level, weight * rest, weight.fma(level, state[1])
            return [
                rest.fma(counted_rest, state[0]),
                sum_of_levels,
                level.fma(counted, state[2]),
                level.fma(counted_rest, state[3]),
            ]

        return loop(builder, count, 1, [zeros(builder) for _ in range(4)], step)

    def small(is_small: bool) -> State:
        if is_small:
            return of_element(builder, table, lambda element: sums(lambda value: nearest(value, element)[1]))
        return either(builder, builder.icmp_signed("==", table, ir.Constant(I64, NF4)), large)

    def large(on_nf4: bool) -> State:
        if on_nf4:
            return sums(lambda value: nf4_index(value).look_up(nf4))
        return sums(lambda value: (value + rounder).max(lowest).min(highest) - rounder)

    rest, levels, squares, products = either(builder, builder.icmp_signed(">", table, ir.Constant(I64, NF4)), small)
    mean_level = form.either(none, levels / size)
    rests = size * (mean * inverse - center) - levels
    spread = squares - mean_level * levels
    fitted = (spread + (products - mean_level * rests)) * scale
    return (rest * scale * scale).widen(F64), spread, fitted, mean_level + center


def _in_fixed_point(
    state: Lanes, source: ir.Value, count: ir.Value, size: Vec, per: Vec, form: Form
) -> Found:  # fmt: skip
    """Of elements in fixed point, on an integer grid."""
    unit, zero = state[UNIT], state[ZERO]
    pairs = unit.builder.lshr(count, ir.Constant(I64, 1))
    lowest, highest = zero.const(0.0) - zero, form.top - zero
    levels, squares, products = measure(source, pairs, state[INVERSE] * unit, lowest, highest)
    scale, wide_size, two = state[SCALE].widen(F64), size.widen(F64), levels.const(2.0)
    error = scale * (scale * squares - two * unit.widen(F64) * products)
    # Through the origin, or about the means: whole numbers, so exactly 0 where all codes are the same.
    counted = form.either(levels.const(0.0), levels)
    spread = wide_size * squares - counted * counted
    fitted = wide_size * products - counted * state[TOTAL]
    return error, spread.to_single(), fitted.to_single() * unit, levels.to_single() * per


@emitted(types.none, _P, _F, *FORM)
def begin(builder, lanes, size, divisor, top, implied, symmetric, scale_kind, under):
    """The means; and the grid of the whole range is the best as long as none has an error."""
    state, form = Lanes(builder, lanes), Form.of(builder, (divisor, top, implied, symmetric, scale_kind, under))
    state[BEST_SCALE], state[BEST_ZERO], _ = form.grid(state[LOW], state[HIGH])
    state[MEAN] = state[TOTAL].to_single() * state[UNIT] / Vec(builder, size).splat()
    state[BEST_ERROR] = zeros(builder, F64).const(float("inf"))


@emitted(types.none, _P, _P, *FORM)
def take_first(builder, lanes, clips, divisor, top, implied, symmetric, scale_kind, under):
    """Send every lane to the first of STARTS starts: their low clips at `clips`, the high ones behind."""
    state, form = Lanes(builder, lanes), Form.of(builder, (divisor, top, implied, symmetric, scale_kind, under))
    state[START] = state[STEP] = zeros(builder)
    low, high = _clipped(state, Memory(builder, clips, F32), state[START])
    state[SCALE], state[ZERO], state[INVERSE] = form.grid(low, high)


@emitted(types.boolean, _P, _P, _P, _P, _F, _F, _F, types.boolean, _P, *FORM)
def advance(
    builder, source, count, lanes, clips, starts, steps, size, fixed, table,
    divisor, top, implied, symmetric, scale_kind, under,
):  # fmt: skip
    """Try every lane's grid, and find the one to try after it; whether any is left.

    A start is always kept. A descent ends where the error does not fall, as it does not where the fit stays where it
    is, or after `steps`; then the lane goes on with the next of `starts` starts.
    """
    state, form = Lanes(builder, lanes), Form.of(builder, (divisor, top, implied, symmetric, scale_kind, under))

    def find(is_fixed: bool) -> State:
        if is_fixed:
            return list(_in_fixed_point(state, source, count, sizes, one / sizes, form))
        return list(in_floats(state, source, count, sizes, form, table))

    sizes = Vec(builder, size).splat()
    one = sizes.const(1.0)
    error, spread, fitted, mean_level = either(builder, fixed, find)
    return go_on(state, (error, spread, fitted, mean_level), clips, starts, steps, form)


def go_on(state: Lanes, found: Found, clips: ir.Value, starts: ir.Value, steps: ir.Value, form: Form) -> Vec:
    """Keep what is best, and choose the grid that each lane tries next; whether any is left. See `advance`."""
    error, spread, fitted, mean_level = found
    builder, step = error.builder, state[STEP]
    limit, number = (Vec(builder, value).splat() for value in (steps, starts))
    none, one = step.const(0.0), step.const(1.0)
    best = error < state[BEST_ERROR]
    for name, value in ((BEST_SCALE, state[SCALE]), (BEST_ZERO, state[ZERO]), (BEST_ERROR, error)):
        state[name] = best.select(value, state[name])
    goes_on = (step.equals(none) | (error < state[ERROR])) & (step < limit)
    state[ERROR] = error

    start = goes_on.select(state[START], (state[START] + one).min(number))
    low, high = _clipped(state, Memory(builder, clips, F32), start.min(number - one))
    usable = (spread > none) & (fitted > none)
    numerator = goes_on.select(usable.select(fitted, state[SCALE]), form.span(low, high))
    denominator = goes_on.select(usable.select(spread, one), form.divisor)
    scale = form.store_scale(numerator / denominator)
    inverse = one / scale
    offset = goes_on.select((mean_level + state[ZERO]) * scale - state[MEAN], none - low)
    state[START], state[STEP] = start, goes_on.select(step + one, none)
    state[SCALE], state[ZERO], state[INVERSE] = scale, form.zero_point(offset, inverse), inverse
    return (start < number).any()


def _clipped(state: Lanes, clips: Memory, start: Vec) -> tuple[Vec, Vec]:
    """The range as these starts clip it."""
    low, high = (start.to_int(I32).look_up(clips.load(ir.Constant(I64, at))) for at in (0, STARTS))
    return state[LOW] * low, state[HIGH] * high


@emitted(types.none, _P, _P, _P)
def spread(builder, source, count, target):
    """Write float32 into one lane: LANES apart."""
    inputs, outputs = Memory(builder, source, F32), Memory(builder, target, F32)

    def step(i: ir.Value, state: State) -> State:
        outputs.store(builder.mul(i, ir.Constant(I64, LANES)), inputs.load(i, 1))
        return state

    loop(builder, count, 1, [], step)


@njit(nogil=True)
def _load_floats(x, kind, first, count, target, low, high, unit, total, scratch):
    """What `fix_group` does, with the elements as they are."""
    for start in range(0, count, SPAN):
        n = min(SPAN, count - start)
        span = as_f32(x, kind, first + start, n, scratch)
        spread(span, n, target + 4 * LANES * start)
        widen_range(span, whole_vectors(n), low, high)
        add_to_total(span, whole_vectors(n), unit, total)


@njit(nogil=True)
def _load(x, kind, first, count, fixed, target, lane, state, scratch):
    """A group into a lane of the lot at `target`, of which the vectors are at `state`."""
    low, high, unit = (
        state + 4 * (LANES * LOW + lane),
        state + 4 * (LANES * HIGH + lane),
        state + 4 * (LANES * UNIT + lane),
    )
    total = state + 4 * LANES * TOTAL + 8 * lane
    if fixed:
        fix_group(x, kind, first, count, target + 4 * lane, low, high, unit, total, scratch)
    else:
        _load_floats(x, kind, first, count, target + 4 * lane, low, high, unit, total, scratch)


@njit(nogil=True)
def _search(source, lot_bytes, count, size, lanes, turns, clips, iterations, fixed, table, form):
    """The best grids of `turns` lots of LANES groups at `source`, into BEST_SCALE and BEST_ZERO of each."""
    state_bytes = 4 * LANE_STATE
    for turn in range(turns):
        begin(lanes + turn * state_bytes, size, *form)
    for lot in range(clips.shape[0]):
        starts, steps = clips[lot, 2 * STARTS], min(clips[lot, 2 * STARTS + 1], np.float32(iterations))
        address = address_of(clips[lot])
        for turn in range(turns):
            take_first(lanes + turn * state_bytes, address, *form)
        going = (1 << turns) - 1
        while going:
            for turn in range(turns):
                place, state = source + turn * lot_bytes, lanes + turn * state_bytes
                if (going >> turn) & 1 and not advance(
                    place, count, state, address, starts, steps, size, fixed, table, *form
                ):
                    going &= ~(1 << turn)


@kernel
def search_grids(
    x, kind, cols, first_row, last_row, row_groups, group, first_group, last_group, size,
    clips, iterations, table, form, scale, zero, transposed, span_buffer, lane_state,
):  # fmt: skip
    """Find the grids of the groups [first_group, last_group) of rows [first_row, last_row).

    A row has `row_groups` groups, each `group` columns after the one before; these have `size`
    elements. `clips` is from `lots_of_starts`; `transposed` holds whole vectors of size * LANES float32 for each lot
    that takes turns, `lane_state` LANE_STATE.
    """
    source, scratch, lanes = address_of(transposed), address_of(span_buffer), address_of(lane_state)
    turns = lane_state.size // LANE_STATE
    in_row = last_group - first_group
    total = (last_row - first_row) * in_row
    fixed = table == NO_TABLE and form[1] <= LARGEST_IN_FIXED_POINT
    # Zeros at the end of a group lose nothing on an integer grid.
    count = whole_vectors(size) if fixed else size
    lot_bytes = (2 if fixed else 4) * LANES * count
    for lot in range(0, total, turns * LANES):
        lane_state[:] = 0.0
        for at in range(turns * LANES):
            index = min(lot + at, total - 1)
            row = index // in_row
            first = (first_row + row) * cols + (first_group + index - row * in_row) * group
            turn, lane = at // LANES, at % LANES
            _load(x, kind, first, size, fixed, source + turn * lot_bytes, lane, lanes + turn * 4 * LANE_STATE, scratch)
        _search(source, lot_bytes, count, np.float32(size), lanes, turns, clips, iterations, fixed, table, form)
        for lane in range(min(turns * LANES, total - lot)):
            index = lot + lane
            g = (first_row + index // in_row) * row_groups + first_group + index % in_row
            at = lane // LANES * LANE_STATE + lane % LANES
            scale[g], zero[g] = lane_state[at + BEST_SCALE * LANES], lane_state[at + BEST_ZERO * LANES]
