"""`Mse` on a super-block: up to sixteen groups at once, one in each lane, which lie transposed in the cache.

First every group finds a grid of its own, as in `search`; then `nested_search` of the schemes is followed line by line.
A pass over the elements of a lot gives errors of one grid for each lane, or of three that differ in the zero point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types

from service.engine.backends.cpu_kernels.caching import kernel
from service.engine.backends.cpu_kernels.codes import ROUNDER
from service.engine.backends.cpu_kernels.grids import store_super
from service.engine.backends.cpu_kernels.search import spread
from service.engine.backends.cpu_kernels.spans import address_of, as_f32
from service.engine.backends.cpu_kernels.vector import F32, F64, I64, LANES, Memory, State, Vec, emitted, loop, zeros
from service.engine.schemes.nested_search import ROUNDS, SPREAD_PARTS, SUPER_PARTS

#: Vectors of float32 that describe a lane: sums of its group and its squares, its range, the grid to try, the grid of
#: this descent and its error, the best grid on its own and its error, codes, their error, the best codes so far.
SUM, SQUARES, LOW, HIGH, SCALE, ZERO, KEPT_SCALE, KEPT_ZERO, KEPT, OWN_SCALE, OWN_ZERO, OWN = range(12)
SCALE_CODE, ZERO_CODE, ERROR, BEST_SCALE_CODE, BEST_ZERO_CODE = range(12, 17)
LANE_STATE = 17 * LANES
#: Numbers that all lanes share: of the scheme, ...
TOP, HALF, MOST, FARTHEST, UNIT, FAR, SIZE = range(7)
#: ... and of the super-block: what is tried as super-scale and spread, and the largest scale and distance of groups.
OVER, SPREAD, LARGEST, DISTANCE = range(7, 11)
NUMBERS = 11
#: Sums from which super-scale and spread are fitted.
FITTED = 5
#: What counts as the error of ranges where that is more than float32 holds.
HUGE = np.float32(3e38)

_P, _F = types.intp, types.float32
_SUPER_PARTS, _SPREAD_PARTS = (np.array(parts, np.float32) for parts in (SUPER_PARTS, SPREAD_PARTS))


@dataclass(frozen=True, slots=True)
class Lot:
    """Groups in lanes: `count` vectors at `source`, what is known of them at `state`, numbers at `numbers`."""

    builder: ir.IRBuilder
    source: ir.Value
    count: ir.Value
    state: ir.Value
    numbers: ir.Value

    def __getitem__(self, name: int) -> Vec:
        return Memory(self.builder, self.state, F32).load(ir.Constant(I64, name * LANES))

    def __setitem__(self, name: int, value: Vec) -> None:
        Memory(self.builder, self.state, F32).store(ir.Constant(I64, name * LANES), value)

    def number(self, name: int) -> Vec:
        """One of the shared numbers in every lane."""
        return Memory(self.builder, self.numbers, F32).load(ir.Constant(I64, name), 1).splat()

    def sums(self, terms: int, of: Callable[[Vec], list[Vec]]) -> list[Vec]:
        """Sums over all elements of the terms that `of` makes of one."""
        x = Memory(self.builder, self.source, F32)

        def step(i: ir.Value, state: State) -> State:
            value = x.load(self.builder.mul(i, ir.Constant(I64, LANES)))
            return [each + term for each, term in zip(state, of(value), strict=True)]

        return loop(self.builder, self.count, 1, [zeros(self.builder) for _ in range(terms)], step)

    def inverse(self, scale: Vec) -> Vec:
        """1 / scale, or 0."""
        none = scale.const(0.0)
        return (scale > none).select(scale.const(1.0) / scale, none)

    def rounded(self, place: Vec, top: Vec) -> Vec:
        """The code next to a place on the grid."""
        rounder = place.const(ROUNDER)
        return (place + rounder).max(rounder).min(top + rounder) - rounder

    def far(self, zero: Vec) -> Vec:
        """Distance of a zero point from the middle, in spreads of 1."""
        return (zero - self.number(HALF)) * self.number(FAR)

    def scale_of(self, code: Vec) -> Vec:
        """`NestedScheme.under`."""
        return self.number(OVER) * (code / self.number(MOST))

    def zero_of(self, code: Vec) -> Vec:
        """`NestedScheme.under`."""
        return self.number(SPREAD) * code * self.number(UNIT) + self.number(HALF)

    def keeps(self) -> tuple[Vec, Vec]:
        """Which groups have the largest scale, and which the farthest zero point."""
        scale = self[OWN_SCALE].equals(self.number(LARGEST))
        return scale, self.far(self[OWN_ZERO]).abs().equals(self.number(DISTANCE))

    def errors(self, scale: Vec, offsets: list[Vec]) -> list[Vec]:
        """What the grids of this scale and each of these zero points lose."""
        inverse, top, none = self.inverse(scale), self.number(TOP), scale.const(0.0)

        def of(value: Vec) -> list[Vec]:
            steps = value * inverse
            places = [steps + zero for zero in offsets]
            rests = [place - self.rounded(place, top) for place in places]
            return [rest * rest for rest in rests]

        found = self.sums(len(offsets), of)
        return [(scale > none).select(each * scale * scale, self[SQUARES]) for each in found]


_LOT = (_P, _P, _P, _P)


@emitted(types.none, *_LOT)
def measure_lot(builder, source, count, state, numbers):
    """Sums and ranges of the groups."""
    lot = Lot(builder, source, count, state, numbers)
    lot[SUM], lot[SQUARES] = lot.sums(2, lambda x: [x, x * x])
    x = Memory(builder, source, F32)

    def widen(i: ir.Value, state: State) -> State:
        value = x.load(builder.mul(i, ir.Constant(I64, LANES)))
        return [value.min(state[0]), value.max(state[1])]

    lot[LOW], lot[HIGH] = loop(builder, count, 1, [zeros(builder), zeros(builder)], widen)
    lot[OWN] = lot[LOW].const(float("inf"))


@emitted(types.none, *_LOT, _F, _F)
def start_lot(builder, source, count, state, numbers, low_clip, high_clip):
    """Send every lane to the grid of its range, clipped."""
    lot = Lot(builder, source, count, state, numbers)
    low, high = (lot[name] * Vec(builder, clip).splat() for name, clip in ((LOW, low_clip), (HIGH, high_clip)))
    none, one, top = low.const(0.0), low.const(1.0), lot.number(TOP)
    scale = (high - low) / top
    usable = scale > none
    zero = usable.select((none - low) / usable.select(scale, one), lot.number(HALF))
    lot[SCALE], lot[ZERO] = scale, zero.max(none).min(top)
    lot[KEPT] = none.const(float("inf"))


@emitted(types.boolean, *_LOT)
def step_lot(builder, source, count, state, numbers):
    """Try the grid of every lane, and fit the next to its codes; whether any lane has got better."""
    lot = Lot(builder, source, count, state, numbers)
    scale, zero, top, size = lot[SCALE], lot[ZERO], lot.number(TOP), lot.number(SIZE)
    inverse, none, one = lot.inverse(scale), scale.const(0.0), scale.const(1.0)

    def of(value: Vec) -> list[Vec]:
        place = value * inverse + zero
        code = lot.rounded(place, top)
        rest = place - code
        return [rest * rest, code, code * code, code * value]

    squares, codes, code_squares, products = lot.sums(4, of)
    error = (scale > none).select(squares * scale * scale, lot[SQUARES])
    better = error < lot[KEPT]
    kept_scale, kept_zero = better.select(scale, lot[KEPT_SCALE]), better.select(zero, lot[KEPT_ZERO])
    lot[KEPT_SCALE], lot[KEPT_ZERO], lot[KEPT] = kept_scale, kept_zero, better.select(error, lot[KEPT])
    best = error < lot[OWN]
    for name, value in ((OWN_SCALE, scale), (OWN_ZERO, zero), (OWN, error)):
        lot[name] = best.select(value, lot[name])

    mean = codes / size
    spread_, shared = code_squares - mean * codes, products - mean * lot[SUM]
    usable = better & (spread_ > none) & (shared > none)
    slope = usable.select(shared, one) / usable.select(spread_, one)
    usable = usable & (slope > none)
    place = mean - lot[SUM] / size / usable.select(slope, one)
    lot[SCALE] = usable.select(slope, kept_scale)
    lot[ZERO] = usable.select(place.max(none).min(top), kept_zero)
    return better.any()


@emitted(types.none, *_LOT)
def take_own(builder, source, count, state, numbers):
    """Have the grid that was begun with count as the best of its own: it is the one of the range."""
    lot = Lot(builder, source, count, state, numbers)
    lot[OWN_SCALE], lot[OWN_ZERO] = lot[SCALE], lot[ZERO]


@emitted(types.none, *_LOT)
def widen_super(builder, source, count, state, numbers):
    """Largest scale and distance of a super-block, these groups included."""
    lot, shared = Lot(builder, source, count, state, numbers), Memory(builder, numbers, F32)
    for name, value in ((LARGEST, lot[OWN_SCALE]), (DISTANCE, lot.far(lot[OWN_ZERO]).abs())):
        place = ir.Constant(I64, name)
        shared.store(place, value.reduce(Vec.max).max(shared.load(place, 1)))


@emitted(types.float32, *_LOT)
def code_lot(builder, source, count, state, numbers):
    """Codes next to the grids that groups have on their own, as `NestedScheme.codes_under` has them; what they lose."""
    lot = Lot(builder, source, count, state, numbers)
    over, distance, most, farthest = (lot.number(n) for n in (OVER, SPREAD, MOST, FARTHEST))
    none, one = over.const(0.0), over.const(1.0)
    keeps_scale, keeps_zero = lot.keeps()
    code = (lot[OWN_SCALE] / (over > none).select(over, one) * most).rint().max(none).min(most)
    far = lot.far(lot[OWN_ZERO])
    zero = (far / (distance > none).select(distance, one) * farthest).rint().max(none - farthest).min(farthest)
    edge = (far > none).select(farthest, (far < none).select(none - farthest, none))
    lot[SCALE_CODE] = (over > none).select(keeps_scale.select(most, code), none)
    lot[ZERO_CODE] = (distance > none).select(keeps_zero.select(edge, zero), none)
    (lot[ERROR],) = lot.errors(lot.scale_of(lot[SCALE_CODE]), [lot.zero_of(lot[ZERO_CODE])])
    return lot[ERROR].reduce(Vec.__add__)


@emitted(types.float32, *_LOT)
def move_lot(builder, source, count, state, numbers):
    """Give every group the best codes within a step; what they lose."""
    lot = Lot(builder, source, count, state, numbers)
    most, farthest, none = lot.number(MOST), lot.number(FARTHEST), lot.number(MOST).const(0.0)
    keeps_scale, keeps_zero = lot.keeps()
    code, zero = lot[SCALE_CODE], lot[ZERO_CODE]
    one = code.const(1.0)
    near = ((zero - one).max(none - farthest), (zero + one).min(farthest))
    zeros_ = [zero, *(keeps_zero.select(zero, each) for each in near)]
    codes = [code, *(keeps_scale.select(code, near) for near in ((code - one).max(none), (code + one).min(most)))]
    offsets = [lot.zero_of(each) for each in zeros_]
    best_code, best_zero, best = code, zero, code.const(float("inf"))
    for each in codes:
        for other, error in zip(zeros_, lot.errors(lot.scale_of(each), offsets), strict=True):
            less = error < best
            best_code, best_zero = less.select(each, best_code), less.select(other, best_zero)
            best = less.select(error, best)
    lot[SCALE_CODE], lot[ZERO_CODE], lot[ERROR] = best_code, best_zero, best
    return best.reduce(Vec.__add__)


@emitted(types.none, *_LOT, _P)
def fit_lot(builder, source, count, state, numbers, fitted):
    """Add to the sums at `fitted`, float64, from which super-scale and spread are found with the codes held."""
    lot = Lot(builder, source, count, state, numbers)
    zero, top, half = lot.zero_of(lot[ZERO_CODE]), lot.number(TOP), lot.number(HALF)
    inverse = lot.inverse(lot.scale_of(lot[SCALE_CODE]))

    def of(value: Vec) -> list[Vec]:
        level = lot.rounded(value * inverse + zero, top) - half
        return [level, level * level, level * value]

    levels, squares, products = lot.sums(3, of)
    part = lot[SCALE_CODE] / lot.number(MOST)
    shift = part.const(0.0) - part * lot[ZERO_CODE]
    terms = (
        part * part * squares,
        part * shift * levels,
        shift * shift * lot.number(SIZE),
        part * products,
        shift * lot[SUM],
    )
    memory = Memory(builder, fitted, F64)
    for number, term in enumerate(terms):
        place = ir.Constant(I64, number)
        memory.store(place, memory.load(place, 1) + term.widen(F64).reduce(Vec.__add__))


@emitted(types.none, *_LOT)
def keep_codes(builder, source, count, state, numbers):
    """Have these codes be the best so far."""
    lot = Lot(builder, source, count, state, numbers)
    lot[BEST_SCALE_CODE], lot[BEST_ZERO_CODE] = lot[SCALE_CODE], lot[ZERO_CODE]


@emitted(types.none, *_LOT)
def write_lot(builder, source, count, state, numbers):
    """Scales and zero points of the best codes, into SCALE and ZERO."""
    lot = Lot(builder, source, count, state, numbers)
    lot[SCALE], lot[ZERO] = lot.scale_of(lot[BEST_SCALE_CODE]), lot.zero_of(lot[BEST_ZERO_CODE])


@njit(nogil=True)
def _own_grids(source, lot_bytes, count, state, lots, numbers, clips, iterations):
    """Of every group the best grid on its own, from all starts."""
    for lot in range(lots):
        place, lanes = source + lot * lot_bytes, state + lot * 4 * LANE_STATE
        for i in range(clips.shape[0]):
            start_lot(place, count, lanes, numbers, clips[i, 0], clips[i, 1])
            for _ in range(iterations + 1):
                if not step_lot(place, count, lanes, numbers):
                    break


@njit(nogil=True)
def _measure_super(source, lot_bytes, count, state, lots, shared):
    """Largest scale and distance of the groups."""
    shared[LARGEST] = shared[DISTANCE] = np.float32(0.0)
    for lot in range(lots):
        widen_super(source + lot * lot_bytes, count, state + lot * 4 * LANE_STATE, address_of(shared))


@njit(nogil=True)
def _coded(source, lot_bytes, count, state, lots, numbers):
    """What the codes next to the groups' own grids lose; for each group they are in its lane."""
    error = np.float32(0.0)
    for lot in range(lots):
        error += code_lot(source + lot * lot_bytes, count, state + lot * 4 * LANE_STATE, numbers)
    return error


@njit(nogil=True)
def _moved(source, lot_bytes, count, state, lots, numbers):
    """What the best codes within a step lose."""
    error = np.float32(0.0)
    for lot in range(lots):
        error += move_lot(source + lot * lot_bytes, count, state + lot * 4 * LANE_STATE, numbers)
    return error


@njit(nogil=True)
def _keep(source, lot_bytes, count, state, lots, shared, best, error):
    """Have the present state be the best, if it loses less than that."""
    if error < best[2]:
        best[0], best[1], best[2] = shared[OVER], shared[SPREAD], error
        for lot in range(lots):
            keep_codes(source + lot * lot_bytes, count, state + lot * 4 * LANE_STATE, address_of(shared))


@njit(nogil=True)
def _fit(source, lot_bytes, count, state, lots, shared, kind, fitted):
    """Super-scale and spread of least squared error, with all codes held."""
    fitted[:] = 0.0
    for lot in range(lots):
        place, lanes = source + lot * lot_bytes, state + lot * 4 * LANE_STATE
        fit_lot(place, count, lanes, address_of(shared), address_of(fitted))
    ss, st, tt, sx, tx = fitted[0], fitted[1], fitted[2], fitted[3], fitted[4]
    determinant = ss * tt - st * st
    if determinant > 1e-6 * ss * tt:
        over, moved = (sx * tt - tx * st) / determinant, (tx * ss - sx * st) / determinant
        if over > 0 and moved > 0:
            shared[OVER] = store_super(over, kind)
            shared[SPREAD] = min(max(np.rint(moved / (over * shared[UNIT])), 1.0), 255.0)


@njit(nogil=True)
def _settle(source, lot_bytes, count, state, lots, shared, kind, best, fitted):
    """`settle_supers`, from `best` on."""
    numbers = address_of(shared)
    _measure_super(source, lot_bytes, count, state, lots, shared)
    for spread_part in _SPREAD_PARTS:
        shared[SPREAD] = np.rint(np.rint(shared[DISTANCE]) * spread_part)
        over, least = np.float32(0.0), np.float32(np.inf)
        for super_part in _SUPER_PARTS:
            shared[OVER] = store_super(shared[LARGEST] * super_part, kind)
            error = _coded(source, lot_bytes, count, state, lots, numbers)
            if error < least:
                over, least = shared[OVER], error
        shared[OVER] = over
        least = _coded(source, lot_bytes, count, state, lots, numbers)
        _keep(source, lot_bytes, count, state, lots, shared, best, least)
        for _ in range(ROUNDS):
            error = _moved(source, lot_bytes, count, state, lots, numbers)
            _keep(source, lot_bytes, count, state, lots, shared, best, error)
            _fit(source, lot_bytes, count, state, lots, shared, kind, fitted)


@njit(nogil=True)
def _begin(source, lot_bytes, count, state, lots, shared, kind, best):
    """The grids of the ranges under the super-scale and spread that they have."""
    numbers = address_of(shared)
    for lot in range(lots):
        place, lanes = source + lot * lot_bytes, state + lot * 4 * LANE_STATE
        measure_lot(place, count, lanes, numbers)
        start_lot(place, count, lanes, numbers, np.float32(1.0), np.float32(1.0))
        take_own(place, count, lanes, numbers)
    _measure_super(source, lot_bytes, count, state, lots, shared)
    shared[OVER], shared[SPREAD] = store_super(shared[LARGEST], kind), np.rint(shared[DISTANCE])
    error = _coded(source, lot_bytes, count, state, lots, numbers)
    best[2] = np.inf
    _keep(source, lot_bytes, count, state, lots, shared, best, error if error < HUGE else HUGE)


@kernel
def search_supers(
    x, kind, cols, first_row, last_row, row_groups, group, first_group, groups, size, clips, iterations,
    scale_kind, shared, scale, zero, transposed, span_buffer, lane_state, best, fitted,
):  # fmt: skip
    """Find the grids of the super-block of `groups` groups from `first_group` on in rows [first_row, last_row).

    Groups are `group` columns apart and have `size` elements. `transposed` holds a vector for each of them and each lot
    of LANES groups, `lane_state` LANE_STATE for each lot, `shared` NUMBERS of which the first are the scheme's.
    """
    source, scratch, state = address_of(transposed), address_of(span_buffer), address_of(lane_state)
    lots, lot_bytes = (groups + LANES - 1) // LANES, 4 * LANES * size
    transposed[:] = 0.0
    for row in range(first_row, last_row):
        for i in range(groups):
            span = as_f32(x, kind, row * cols + (first_group + i) * group, size, scratch)
            spread(span, size, source + i // LANES * lot_bytes + 4 * (i % LANES))
        _begin(source, lot_bytes, size, state, lots, shared, scale_kind, best)
        _own_grids(source, lot_bytes, size, state, lots, address_of(shared), clips, iterations)
        _settle(source, lot_bytes, size, state, lots, shared, scale_kind, best, fitted)
        shared[OVER], shared[SPREAD] = best[0], best[1]
        for lot in range(lots):
            write_lot(source + lot * lot_bytes, size, state + lot * 4 * LANE_STATE, address_of(shared))
        for i in range(groups):
            g, at = row * row_groups + first_group + i, i // LANES * LANE_STATE + i % LANES
            scale[g], zero[g] = lane_state[at + SCALE * LANES], lane_state[at + ZERO * LANES]
