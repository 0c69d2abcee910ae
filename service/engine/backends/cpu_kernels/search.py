"""`Mse` on sixteen groups at once, one in each lane; the groups lie transposed in the cache.

One pass over the elements gives the error of a grid and the sums from which the next is fitted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types

from service.engine.backends.cpu_kernels.caching import kernel
from service.engine.backends.cpu_kernels.codes import integer_steps, nf4_index
from service.engine.backends.cpu_kernels.grids import FORM, Form
from service.engine.backends.cpu_kernels.spans import SPAN, address_of, as_f32
from service.engine.backends.cpu_kernels.vector import F32, I64, LANES, Memory, State, Vec, emitted, loop, zeros
from service.engine.schemes.codebook import NF4_TABLE

#: Vectors that describe a descent: the grid, its error and sums, and the best grid so far.
#: The sums are those of levels less CENTER, and of x less that many steps, so that little cancels in the fit.
SCALE, ZERO, CENTER, ERROR, LEVELS, SQUARES, PRODUCTS = range(7)
BEST_SCALE, BEST_ZERO, BEST_ERROR, LOW, HIGH, TOTAL = range(7, 13)
LANE_STATE = 13 * LANES

_P, _F = types.intp, types.float32


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
    scale: Vec,
    zero: Vec,
    center: Vec,
    form: Form,
    codebook: ir.Value,
) -> State:
    """Error, Σ level, Σ level², Σ x·level of each lane's group on its grid, seen from its center."""
    builder = x.builder
    inverse, minus_scale = scale.const(1.0) / scale, scale.const(0.0) - scale
    lowest, highest, origin = scale.const(0.0) - zero, form.top - zero, center * scale
    table = Vec(builder, ir.Constant(ir.VectorType(F32, LANES), NF4_TABLE.tolist()))

    def on_table(value: Vec) -> Vec:
        return nf4_index(value * inverse).look_up(table)

    def on_grid(value: Vec) -> Vec:
        return integer_steps(value, inverse, lowest, highest, center)[1]

    def sums(level_of: Callable[[Vec], Vec]) -> tuple[State, ir.Block]:
        def step(i: ir.Value, state: State) -> State:
            value = x.load(builder.mul(i, ir.Constant(I64, LANES)))
            level, near = level_of(value), value - origin
            d = level.fma(minus_scale, near)
            return [d.fma(d, state[0]), state[1] + level, level.fma(level, state[2]), near.fma(level, state[3])]

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


@emitted(types.none, _P, _P, _P)
def find_ranges(builder, source, count, lanes):
    """LOW, HIGH and TOTAL of the groups."""
    x, state = Memory(builder, source, F32), Lanes(builder, lanes)

    def step(i: ir.Value, s: State) -> State:
        value = x.load(builder.mul(i, ir.Constant(I64, LANES)))
        return [value.min(s[0]), value.max(s[1]), s[2] + value]

    state[LOW], state[HIGH], state[TOTAL] = loop(builder, count, 1, [zeros(builder) for _ in range(3)], step)


@emitted(types.none, _P, _P, _P, _F, _F, _F, types.boolean, *FORM)
def start_descent(
    builder, source, count, lanes, low_clip, high_clip, size, codebook, divisor, top, implied, symmetric, scale_kind
):
    """The grid of the clipped range, measured."""
    state, form = Lanes(builder, lanes), Form.of(builder, (divisor, top, implied, symmetric, scale_kind))
    low, high = (Vec(builder, clip).splat() for clip in (low_clip, high_clip))
    scale, zero = form.grid(state[LOW] * low, state[HIGH] * high)
    for name, value in _visit(state, Memory(builder, source, F32), count, size, scale, zero, form, codebook).items():
        state[name] = value


@emitted(types.boolean, _P, _P, _P, _F, types.boolean, *FORM)
def descend(builder, source, count, lanes, size, codebook, divisor, top, implied, symmetric, scale_kind):
    """Refit every lane's grid to its codes and keep it where the error falls; whether any did."""
    state, form = Lanes(builder, lanes), Form.of(builder, (divisor, top, implied, symmetric, scale_kind))
    scale, zero = _refit(state, form, Vec(builder, size).splat())
    found = _visit(state, Memory(builder, source, F32), count, size, scale, zero, form, codebook)
    better = found[ERROR] < state[ERROR]
    state.replace(better, found)
    return better.any()


def _visit(
    state: Lanes, x: Memory, count: ir.Value, size: ir.Value, scale: Vec, zero: Vec, form: Form, codebook: ir.Value
) -> dict[int, Vec]:
    """A grid with its error and sums."""
    mean_level = (state[TOTAL] / Vec(x.builder, size).splat() / scale).rint()
    center = form.either(scale.const(0.0), mean_level.max(scale.const(0.0) - zero).min(form.top - zero))
    sums = _measure(x, count, scale, zero, center, form, codebook)
    return dict(zip((SCALE, ZERO, CENTER, ERROR, LEVELS, SQUARES, PRODUCTS), [scale, zero, center, *sums], strict=True))


def _refit(state: Lanes, form: Form, size: Vec) -> tuple[Vec, Vec]:
    """`Scheme.refit`, from the sums of the codes held."""
    mean_level = state[LEVELS] / size
    total = state[TOTAL] - size * state[CENTER] * state[SCALE]
    numerator = form.either(state[PRODUCTS], state[PRODUCTS] - mean_level * total)
    denominator = form.either(state[SQUARES], state[SQUARES] - mean_level * state[LEVELS])
    none = size.const(0.0)
    usable = (denominator > none) & (numerator > none)
    slope = usable.select(numerator, state[SCALE]) / usable.select(denominator, size.const(1.0))
    scale = form.store_scale(slope)
    offset = (mean_level + state[CENTER] + state[ZERO]) * scale - state[TOTAL] / size
    return scale, form.zero_point(offset, scale)


@emitted(types.none, _P)
def keep_first(builder, lanes):
    """The grid reached is the best so far, even where its error is beyond float32."""
    state = Lanes(builder, lanes)
    state[BEST_SCALE], state[BEST_ZERO], state[BEST_ERROR] = state[SCALE], state[ZERO], state[ERROR]


@emitted(types.none, _P)
def keep_best(builder, lanes):
    """The grid reached becomes the best one where its error is smaller."""
    state = Lanes(builder, lanes)
    better = state[ERROR] < state[BEST_ERROR]
    state.replace(better, {BEST_SCALE: state[SCALE], BEST_ZERO: state[ZERO], BEST_ERROR: state[ERROR]})


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
def _search(source, count, lanes, clips, iterations, codebook, form):
    """The best grids of the LANES groups at `source`, into BEST_SCALE and BEST_ZERO."""
    find_ranges(source, count, lanes)
    start_descent(source, count, lanes, np.float32(1.0), np.float32(1.0), np.float32(count), codebook, *form)
    keep_first(lanes)
    for i in range(clips.shape[0]):
        start_descent(source, count, lanes, clips[i, 0], clips[i, 1], np.float32(count), codebook, *form)
        for _ in range(iterations):
            if not descend(source, count, lanes, np.float32(count), codebook, *form):
                break
        keep_best(lanes)


@kernel
def search_grids(
    x, kind, cols, first_row, last_row, row_groups, group, first_group, last_group, size,
    clips, iterations, codebook, form, scale, zero, transposed, span_buffer, lane_state,
):  # fmt: skip
    """Find the grids of the groups [first_group, last_group) of rows [first_row, last_row).

    A row has `row_groups` groups, each `group` columns after the one before; these have `size`
    elements. `transposed` holds size * LANES float32.
    """
    source, scratch, lanes = address_of(transposed), address_of(span_buffer), address_of(lane_state)
    in_row = last_group - first_group
    total = (last_row - first_row) * in_row
    for lot in range(0, total, LANES):
        for lane in range(LANES):
            index = min(lot + lane, total - 1)
            first = (first_row + index // in_row) * cols + (first_group + index % in_row) * group
            load_lane(x, kind, first, size, source + 4 * lane, scratch)
        _search(source, size, lanes, clips, iterations, codebook, form)
        for lane in range(min(LANES, total - lot)):
            index = lot + lane
            g = (first_row + index // in_row) * row_groups + first_group + index % in_row
            scale[g] = lane_state[BEST_SCALE * LANES + lane]
            zero[g] = lane_state[BEST_ZERO * LANES + lane]
