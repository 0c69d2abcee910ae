"""Grids tried for a group of sixteen rows at once, one row in each lane: what `methods/descent.py` does, as vectors.

A lot is a group in LANES rows: arrays (g, LANES) of float32. A grid lies in memory as GRID vectors: scale, its
reciprocal, zero point, lowest and highest level (of a table the last two do not matter).
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import types

from service.engine.backends.cpu_kernels.codes import ROUNDER, nf4_index
from service.engine.backends.cpu_kernels.grids import FORM, Form
from service.engine.backends.cpu_kernels.vector import F32, I64, LANES, Memory, State, Vec, emitted, loop, zeros
from service.engine.schemes.codebook import NF4_TABLE

#: Bytes of a vector; vectors of a grid, in this order.
VECTOR = 4 * LANES
SCALE, INVERSE, ZERO, LOWEST, HIGHEST = range(5)
GRID = 5
#: Vectors of sums that `weigh_integer` makes.
SUMS = 6

_P, _F = types.intp, types.float32


class _Lot:
    """Vectors one after the other in memory."""

    def __init__(self, builder: ir.IRBuilder, address: ir.Value) -> None:
        self.builder, self.memory = builder, Memory(builder, address, F32)

    def __getitem__(self, index: int | ir.Value) -> Vec:
        return self.memory.load(self._at(index))

    def __setitem__(self, index: int | ir.Value, value: Vec) -> None:
        self.memory.store(self._at(index), value)

    def _at(self, index: int | ir.Value) -> ir.Value:
        if isinstance(index, int):
            return ir.Constant(I64, index * LANES)
        return self.builder.mul(index, ir.Constant(I64, LANES))


def _lots(builder: ir.IRBuilder, *addresses: ir.Value) -> list[_Lot]:
    return [_Lot(builder, address) for address in addresses]


def _set_grid(grid: _Lot, scale: Vec, zero: Vec, top: Vec) -> None:
    none = zero.const(0.0)
    grid[SCALE], grid[INVERSE], grid[ZERO] = scale, scale.const(1.0) / scale, zero
    grid[LOWEST], grid[HIGHEST] = none - zero, top - zero


@emitted(types.none, _P, _P, _F, _F, _P, *FORM)
def move_grid(
    builder, scales, zeros_, factor, shift, grid, divisor, top, implied, symmetric, scale_kind, under
):  # fmt: skip
    """The grid of these scales times `factor` and zero points plus `shift`."""
    form = Form.of(builder, (divisor, top, implied, symmetric, scale_kind, under))
    (scale,), (zero,) = ([lot[0]] for lot in _lots(builder, scales, zeros_))
    by, plus = (Vec(builder, value).splat() for value in (factor, shift))
    moved = form.either(zero, (zero + plus).max(zero.const(0.0)).min(form.top))
    _set_grid(_Lot(builder, grid), form.store_scale(scale * by), moved, form.top)


@emitted(types.none, _P, _P, _F, _F, _P, *FORM)
def range_grid(
    builder, lows, highs, low_clip, high_clip, grid, divisor, top, implied, symmetric, scale_kind, under
):  # fmt: skip
    """The grid that spans the clipped ranges."""
    form = Form.of(builder, (divisor, top, implied, symmetric, scale_kind, under))
    low, high = (lot[0] for lot in _lots(builder, lows, highs))
    low, high = low * Vec(builder, low_clip).splat(), high * Vec(builder, high_clip).splat()
    scale, zero, _ = form.grid(low, high)
    _set_grid(_Lot(builder, grid), scale, zero, form.top)


@emitted(types.none, _P, _P, _P, _P)
def widest(builder, source, count, lows, highs):
    """The range, 0 included, of each lane of a lot."""
    lot, low, high = _lots(builder, source, lows, highs)

    def step(j: ir.Value, state: State) -> State:
        return [lot[j].min(state[0]), lot[j].max(state[1])]

    low[0], high[0] = loop(builder, count, 1, [zeros(builder), zeros(builder)], step)


def _on_integers(grid: _Lot) -> Callable[[Vec], Vec]:
    lowest, highest = grid[LOWEST], grid[HIGHEST]

    def level(t: Vec) -> Vec:
        rounder = t.const(ROUNDER)
        return t.max(lowest).min(highest) + rounder - rounder

    return level


def _on_table(grid: _Lot) -> Callable[[Vec], Vec]:
    table = Vec(grid.builder, ir.Constant(ir.VectorType(F32, LANES), NF4_TABLE.tolist()))
    return lambda t: nf4_index(t).look_up(table)


def _fit_level(
    builder: ir.IRBuilder, rule: Callable[[_Lot], Callable[[Vec], Vec]],
    level: ir.Value, rest: ir.Value, x: ir.Value, inverse_fed: ir.Value, grid: ir.Value, change: ir.Value,
) -> Vec:  # fmt: skip
    levels, rests, weights, grids, changes = _lots(builder, level, rest, x, grid, change)
    scale, old = grids[SCALE], levels[0]
    fed = Vec(builder, inverse_fed).splat()
    wanted = (fed > fed.const(0.0)).select(rests[0].fma(fed, old * scale), weights[0])
    new = rule(grids)(wanted * grids[INVERSE])
    levels[0], changes[0] = new, (new - old) * scale
    return new.differs(old).any()


@emitted(types.boolean, _P, _P, _P, _F, _P, _P)
def fit_level_integer(builder, level, rest, x, inverse_fed, grid, change):
    """The best level of a column given all others; the change of its values; and whether there is any.

    `inverse_fed` is 0 of a column that is never fed: it gets the level next to x.
    """
    return _fit_level(builder, _on_integers, level, rest, x, inverse_fed, grid, change)


@emitted(types.boolean, _P, _P, _P, _F, _P, _P)
def fit_level_nf4(builder, level, rest, x, inverse_fed, grid, change):
    """The same on the NF4 table."""
    return _fit_level(builder, _on_table, level, rest, x, inverse_fed, grid, change)


@emitted(types.none, _P, _P, _P, _P)
def subtract_products(builder, rest, change, factors, count):
    """Of each of `count` vectors `change` times its factor."""
    rests, changes = _lots(builder, rest, change)
    moved, factor = changes[0], Memory(builder, factors, F32)

    def step(j: ir.Value, state: State) -> State:
        minus = rests[j].const(0.0) - factor.load(j, 1).splat()
        rests[j] = moved.fma(minus, rests[j])
        return state

    loop(builder, count, 1, [], step)


@emitted(types.none, _P, _P, _P, _P, _P, *FORM)
def fit_scale(
    builder, levels, rest, h, count, grid, divisor, top, implied, symmetric, scale_kind, under
):  # fmt: skip
    """The scale of least error with the levels held, and what is left to make up for with it."""
    form = Form.of(builder, (divisor, top, implied, symmetric, scale_kind, under))
    level, rests, hs, grids = _lots(builder, levels, rest, h, grid)

    def add(j: ir.Value, state: State) -> State:
        return [level[j].fma(hs[j], state[0]), level[j].fma(hs[j] - rests[j], state[1])]

    numerator, denominator = loop(builder, count, 1, [zeros(builder), zeros(builder)], add)
    none, one = numerator.const(0.0), numerator.const(1.0)
    usable = (numerator > none) & (denominator > none)
    share = usable.select(numerator, one) / usable.select(denominator, one)
    old = grids[SCALE]
    scale = form.store_scale(old * share)
    ratio = scale / old
    _set_grid(grids, scale, grids[ZERO], form.top)

    def scaled(j: ir.Value, state: State) -> State:
        rests[j] = hs[j] - (hs[j] - rests[j]) * ratio
        return state

    loop(builder, count, 1, [], scaled)


@emitted(types.none, _P, _P, _P, _P, _P, _P, _P, _P)
def keep_better(builder, levels, rest, h, count, grid, error, values, best):
    """Take values and grid of the lanes that have less error than `error`, which they lower."""
    level, rests, hs, grids, least, kept, best_grid = _lots(builder, levels, rest, h, grid, error, values, best)
    scale = grids[SCALE]

    def add(j: ir.Value, state: State) -> State:
        return [level[j].fma(hs[j] + rests[j], state[0])]

    (total,) = loop(builder, count, 1, [zeros(builder)], add)
    found = total.const(0.0) - total * scale
    better = found < least[0]
    least[0] = better.select(found, least[0])
    for name in range(GRID):
        best_grid[name] = better.select(grids[name], best_grid[name])

    def take(j: ir.Value, state: State) -> State:
        kept[j] = better.select(level[j] * scale, kept[j])
        return state

    loop(builder, count, 1, [], take)


def _weigh(
    builder: ir.IRBuilder, rule: Callable[[_Lot], Callable[[Vec], Vec]],
    x: ir.Value, weights: ir.Value, count: ir.Value, grid: ir.Value, sums: ir.Value,
) -> None:  # fmt: skip
    lot, grids, total = _lots(builder, x, grid, sums)
    counts, level_of, inverse = Memory(builder, weights, F32), rule(grids), grids[INVERSE]

    def add(j: ir.Value, state: State) -> State:
        weight, value = counts.load(j, 1).splat(), lot[j] * inverse
        level = level_of(value)
        rest, weighed = value - level, weight * level
        return [
            (weight * rest).fma(rest, state[0]), state[1] + weighed, weighed.fma(level, state[2]),
            weighed.fma(rest, state[3]), weight.fma(rest, state[4]), state[5] + weight,
        ]  # fmt: skip

    for name, value in enumerate(loop(builder, count, 1, [zeros(builder) for _ in range(SUMS)], add)):
        total[name] = value


@emitted(types.none, _P, _P, _P, _P, _P)
def weigh_integer(builder, x, weights, count, grid, sums):
    """Sums over a lot on a grid, in its steps, each column with its weight w: w r², w l, w l², w l r, w r, w.

    l are the levels of x, r what they leave.
    """
    _weigh(builder, _on_integers, x, weights, count, grid, sums)


@emitted(types.none, _P, _P, _P, _P, _P)
def weigh_nf4(builder, x, weights, count, grid, sums):
    """The same on the NF4 table."""
    _weigh(builder, _on_table, x, weights, count, grid, sums)


@emitted(types.boolean, _P, _P, _P, _P, *FORM)
def refit_grid(builder, sums, grid, error, best, divisor, top, implied, symmetric, scale_kind, under):
    """Keep the grid of these sums in the lanes where it is the best yet, and move it to what fits its levels.

    `error` are the errors of the grids before it and of the best; whether any lane's error still falls.
    """
    form = Form.of(builder, (divisor, top, implied, symmetric, scale_kind, under))
    total, grids, errors, kept = _lots(builder, sums, grid, error, best)
    squares, levels, spread, products, rests, weights = (total[i] for i in range(SUMS))
    scale, zero = grids[SCALE], grids[ZERO]
    found = squares * scale * scale
    better, falls = found < errors[1], found < errors[0]
    errors[0], errors[1] = found, better.select(found, errors[1])
    for name in range(GRID):
        kept[name] = better.select(grids[name], kept[name])
    none, one = found.const(0.0), found.const(1.0)
    # Of least squares of x = l + r on l the slope is 1 and what the rests add; the intercept moves the zero point.
    count = (weights > none).select(weights, one)
    mean = form.either(none, levels / count)
    added, under = products - mean * rests, spread - mean * levels
    fits = (under > none) & (under + added > none)
    slope = fits.select(under + added, one) / fits.select(under, one)
    new = form.store_scale(scale * slope)
    intercept = (rests + levels) / count - slope * mean
    _set_grid(grids, new, form.zero_point((zero * slope - intercept) * scale, one / new), form.top)
    return falls.any()


@emitted(types.none, _P, _P, _P)
def set_levels(builder, values, count, grid):
    """Values (a lot) in steps of a grid, not rounded."""
    lot, inverse = _Lot(builder, values), _Lot(builder, grid)[INVERSE]

    def step(j: ir.Value, state: State) -> State:
        lot[j] = lot[j] * inverse
        return state

    loop(builder, count, 1, [], step)


@emitted(types.none, _P, _P, _P, _P, _P)
def error_of(builder, values, rest, h, count, error):
    """What values (a lot) add to the error, less what no values change."""
    lot, rests, hs, errors = _lots(builder, values, rest, h, error)

    def add(j: ir.Value, state: State) -> State:
        return [lot[j].fma(hs[j] + rests[j], state[0])]

    (total,) = loop(builder, count, 1, [zeros(builder)], add)
    errors[0] = total.const(0.0) - total


def _code(
    builder: ir.IRBuilder, rule: Callable[[_Lot], Callable[[Vec], Vec]],
    wanted: ir.Value, grid: ir.Value, weight: ir.Value, value: ir.Value, error: ir.Value,
) -> None:  # fmt: skip
    targets, grids, weights, values, errors = _lots(builder, wanted, grid, weight, value, error)
    values[0] = rule(grids)(targets[0] * grids[INVERSE]) * grids[SCALE]
    errors[0] = weights[0] - values[0]


@emitted(types.none, _P, _P, _P, _P, _P)
def code_integer(builder, wanted, grid, weight, value, error):
    """The value next to what is wanted of a weight, and the weight's error."""
    _code(builder, _on_integers, wanted, grid, weight, value, error)


@emitted(types.none, _P, _P, _P, _P, _P)
def code_nf4(builder, wanted, grid, weight, value, error):
    """The same on the NF4 table."""
    _code(builder, _on_table, wanted, grid, weight, value, error)


@emitted(_F, _P)
def float_at(builder, address):
    """The float32 at an address."""
    return Memory(builder, address, F32).load(ir.Constant(I64, 0), 1)
