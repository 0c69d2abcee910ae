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
from service.engine.backends.cpu_kernels.grids import FORM, Form
from service.engine.backends.cpu_kernels.spans import SPAN, address_of, as_f32
from service.engine.backends.cpu_kernels.vector import F32, I32, I64, LANES, Memory, State, Vec, emitted, loop, zeros
from service.engine.schemes.codebook import NF4_TABLE

#: Vectors that describe a descent: the grid reached, its error and sums; the grid to try; start and step; and the best
#: grid so far. Levels are counted from CENTER, so that little cancels in the fit, and in steps of the scale like all
#: sums: Σ level, Σ level², Σ level·remainder.
SCALE, ZERO, INVERSE, CENTER, ERROR, LEVELS, SQUARES, PRODUCTS = range(8)
NEXT_SCALE, NEXT_ZERO, NEXT_INVERSE, START, STEP = range(8, 13)
BEST_SCALE, BEST_ZERO, BEST_ERROR, LOW, HIGH, MEAN = range(13, 19)
LANE_STATE = 19 * LANES
#: Lots that take turns, if their groups are so short that all fit the cache.
TURNS, LONGEST_IN_TURNS = 2, 256
#: Starts that lanes are given together: as many as one permutation chooses from.
STARTS = LANES

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
        self.memory = Memory(builder, address, F32)

    def __getitem__(self, name: int) -> Vec:
        return self.memory.load(ir.Constant(I64, name * LANES))

    def __setitem__(self, name: int, value: Vec) -> None:
        self.memory.store(ir.Constant(I64, name * LANES), value)

    def replace(self, where: Vec, values: dict[int, Vec]) -> None:
        """Store the values in the lanes named."""
        for name, value in values.items():
            self[name] = where.select(value, self[name])


def _measure(
    x: Memory,
    count: ir.Value,
    inverse: Vec,
    zero: Vec,
    center: Vec,
    form: Form,
    codebook: ir.Value,
) -> State:
    """Σ remainder², Σ level, Σ level², Σ level·remainder of each lane's group on its grid, seen from its center."""
    builder = x.builder
    rounder, none = zero.const(ROUNDER), zero.const(0.0)
    lowest, highest = none - zero - center + rounder, form.top - zero - center + rounder
    table, origin = Vec(builder, ir.Constant(ir.VectorType(F32, LANES), NF4_TABLE.tolist())), none - center

    def on_table(value: Vec) -> Vec:
        return nf4_index(value).look_up(table)

    def on_grid(value: Vec) -> Vec:
        return (value + rounder).max(lowest).min(highest) - rounder

    def sums(level_of: Callable[[Vec], Vec]) -> tuple[State, ir.Block]:
        def step(i: ir.Value, state: State) -> State:
            value = x.load(builder.mul(i, ir.Constant(I64, LANES))).fma(inverse, origin)
            level = level_of(value)
            rest = value - level
            return [
                rest.fma(rest, state[0]),
                state[1] + level,
                level.fma(level, state[2]),
                level.fma(rest, state[3]),
            ]

        return loop(builder, count, 1, [zeros(builder) for _ in range(4)], step), builder.block

    with builder.if_else(codebook) as (then, otherwise):
        with then:
            a, a_block = sums(on_table)
        with otherwise:
            b, b_block = sums(on_grid)
    merged = []
    for one, other in zip(a, b, strict=True):
        phi = builder.phi(one.type)
        phi.add_incoming(one.value, a_block)
        phi.add_incoming(other.value, b_block)
        merged.append(Vec(builder, phi))
    return merged


@emitted(types.none, _P, _P, _P, _F, *FORM)
def begin(builder, source, count, lanes, size, divisor, top, implied, symmetric, scale_kind):
    """LOW, HIGH and MEAN of the groups; the grid of the whole range is the best as long as none has an error."""
    x, state = Memory(builder, source, F32), Lanes(builder, lanes)
    form = Form.of(builder, (divisor, top, implied, symmetric, scale_kind))

    def step(i: ir.Value, s: State) -> State:
        value = x.load(builder.mul(i, ir.Constant(I64, LANES)))
        return [value.min(s[0]), value.max(s[1]), s[2] + value]

    state[LOW], state[HIGH], total = loop(builder, count, 1, [zeros(builder) for _ in range(3)], step)
    state[MEAN] = total / Vec(builder, size).splat()
    state[BEST_SCALE], state[BEST_ZERO], _ = form.grid(state[LOW], state[HIGH])
    state[BEST_ERROR] = zeros(builder).const(float("inf"))


@emitted(types.none, _P, _P, *FORM)
def take_first(builder, lanes, clips, divisor, top, implied, symmetric, scale_kind):
    """Send every lane to the first of STARTS starts: their low clips at `clips`, the high ones behind."""
    state, form = Lanes(builder, lanes), Form.of(builder, (divisor, top, implied, symmetric, scale_kind))
    state[START] = state[STEP] = zeros(builder)
    state[NEXT_SCALE], state[NEXT_ZERO], state[NEXT_INVERSE] = _start(
        state, Memory(builder, clips, F32), state[START], form
    )


@emitted(types.boolean, _P, _P, _P, _P, _F, _F, _F, types.boolean, *FORM)
def advance(
    builder, source, count, lanes, clips, starts, steps, size, codebook, divisor, top, implied, symmetric, scale_kind
):
    """Try every lane's next grid, keep it where the error falls, and find the one after; whether any is left.

    A start is always kept. A descent ends where the error does not fall, the fit stays where it is, or
    after `steps`; then the lane goes on with the next of `starts` starts.
    """
    state, form = Lanes(builder, lanes), Form.of(builder, (divisor, top, implied, symmetric, scale_kind))
    begun, limit, number = state[STEP], *(Vec(builder, value).splat() for value in (steps, starts))
    sizes = Vec(builder, size).splat()
    one, following = begun.const(1.0), (state[START] + begun.const(1.0)).min(number)
    first = _start(state, Memory(builder, clips, F32), following.min(number - one), form)
    found = _visit(state, Memory(builder, source, F32), count, form, codebook)
    kept = begun.equals(begun.const(0.0)) | (found[ERROR] < state[ERROR])
    state.replace(kept, found)
    best = kept & (state[ERROR] < state[BEST_ERROR])
    state.replace(best, {BEST_SCALE: state[SCALE], BEST_ZERO: state[ZERO], BEST_ERROR: state[ERROR]})
    fit = _refit(state, form, sizes)
    goes_on = kept & (begun < limit) & (fit[0].differs(state[SCALE]) | fit[1].differs(state[ZERO]))
    start = goes_on.select(state[START], following)
    state[START], state[STEP] = start, goes_on.select(begun + one, begun.const(0.0))
    for name, further, other in zip((NEXT_SCALE, NEXT_ZERO, NEXT_INVERSE), fit, first, strict=True):
        state[name] = goes_on.select(further, other)
    return (start < number).any()


def _start(state: Lanes, clips: Memory, start: Vec, form: Form) -> tuple[Vec, Vec, Vec]:
    """The grid of the range as this start clips it."""

    def clip(at: int) -> Vec:
        table = clips.load(ir.Constant(I64, at))
        return start.to_int(I32).look_up(table)

    low, high = clip(0), clip(STARTS)
    return form.grid(state[LOW] * low, state[HIGH] * high)


def _visit(state: Lanes, x: Memory, count: ir.Value, form: Form, codebook: ir.Value) -> dict[int, Vec]:
    """The grid to try, with its error and sums."""
    scale, zero, inverse = state[NEXT_SCALE], state[NEXT_ZERO], state[NEXT_INVERSE]
    none = scale.const(0.0)
    mean_level = (state[MEAN] * inverse).rint()
    center = form.either(none, mean_level.max(none - zero).min(form.top - zero))
    rest, *sums = _measure(x, count, inverse, zero, center, form, codebook)
    names = (SCALE, ZERO, INVERSE, CENTER, ERROR, LEVELS, SQUARES, PRODUCTS)
    return dict(zip(names, [scale, zero, inverse, center, rest * scale * scale, *sums], strict=True))


def _refit(state: Lanes, form: Form, size: Vec) -> tuple[Vec, Vec, Vec]:
    """`Scheme.refit`, from the sums of the codes held."""
    none, one, held = size.const(0.0), size.const(1.0), state[SCALE]
    mean_level = form.either(none, state[LEVELS] * (one / size))
    rests = size * (state[MEAN] * state[INVERSE] - state[CENTER]) - state[LEVELS]
    spread = state[SQUARES] - mean_level * state[LEVELS]
    fitted = spread + (state[PRODUCTS] - mean_level * rests)
    usable = (spread > none) & (fitted > none)
    scale = form.store_scale(usable.select(held * fitted, held) / usable.select(spread, one))
    inverse = one / scale
    offset = (mean_level + state[CENTER] + state[ZERO]) * scale - state[MEAN]
    return scale, form.zero_point(offset, inverse), inverse


@emitted(types.none, _P, _P, _P)
def spread(builder, source, count, target):
    """Write float32 into one lane: LANES apart."""
    inputs, outputs = Memory(builder, source, F32), Memory(builder, target, F32)

    def step(i: ir.Value, state: State) -> State:
        outputs.store(builder.mul(i, ir.Constant(I64, LANES)), inputs.load(i, 1))
        return state

    loop(builder, count, 1, [], step)


@njit(nogil=True)
def load_lane(x: int, kind: int, first: int, count: int, target: int, scratch: int) -> None:
    """Elements [first, first + count) into the lane at `target`."""
    for start in range(0, count, SPAN):
        n = min(SPAN, count - start)
        spread(as_f32(x, kind, first + start, n, scratch), n, target + 4 * LANES * start)


@njit(nogil=True)
def _search(source, count, lanes, turns, clips, iterations, codebook, form):
    """The best grids of `turns` lots of LANES groups at `source`, into BEST_SCALE and BEST_ZERO of each."""
    size = np.float32(count)
    lot_bytes, state_bytes = 4 * LANES * count, 4 * LANE_STATE
    for turn in range(turns):
        begin(source + turn * lot_bytes, count, lanes + turn * state_bytes, size, *form)
    for table in range(clips.shape[0]):
        starts, steps = clips[table, 2 * STARTS], min(clips[table, 2 * STARTS + 1], np.float32(iterations))
        address = address_of(clips[table])
        for turn in range(turns):
            take_first(lanes + turn * state_bytes, address, *form)
        going = (1 << turns) - 1
        while going:
            for turn in range(turns):
                place, state = source + turn * lot_bytes, lanes + turn * state_bytes
                if (going >> turn) & 1 and not advance(
                    place, count, state, address, starts, steps, size, codebook, *form
                ):
                    going &= ~(1 << turn)


@kernel
def search_grids(
    x, kind, cols, first_row, last_row, row_groups, group, first_group, last_group, size,
    clips, iterations, codebook, form, scale, zero, transposed, span_buffer, lane_state,
):  # fmt: skip
    """Find the grids of the groups [first_group, last_group) of rows [first_row, last_row).

    A row has `row_groups` groups, each `group` columns after the one before; these have `size`
    elements. `clips` is from `lots_of_starts`; `transposed` holds size * LANES float32 for each lot
    that takes turns, `lane_state` LANE_STATE.
    """
    source, scratch, lanes = address_of(transposed), address_of(span_buffer), address_of(lane_state)
    turns = lane_state.size // LANE_STATE
    in_row = last_group - first_group
    total = (last_row - first_row) * in_row
    for lot in range(0, total, turns * LANES):
        for lane in range(turns * LANES):
            index = min(lot + lane, total - 1)
            first = (first_row + index // in_row) * cols + (first_group + index % in_row) * group
            target = source + 4 * (lane // LANES * LANES * size + lane % LANES)
            load_lane(x, kind, first, size, target, scratch)
        _search(source, size, lanes, turns, clips, iterations, codebook, form)
        for lane in range(min(turns * LANES, total - lot)):
            index = lot + lane
            g = (first_row + index // in_row) * row_groups + first_group + index % in_row
            at = lane // LANES * LANE_STATE + lane % LANES
            scale[g], zero[g] = lane_state[at + BEST_SCALE * LANES], lane_state[at + BEST_ZERO * LANES]
