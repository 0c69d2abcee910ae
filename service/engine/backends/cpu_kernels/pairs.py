"""Groups of whole pairs of vectors, or of half a pair, straight from the elements as they are stored.

A pair is 2 * LANES elements: those of even and those of odd index. That is how 16-bit floats come out of a
32-bit lane, with a shift and a mask, and how two codes go into a byte, with one multiplication. Nothing
is written to memory between the source and the packed codes, and sums stay in float32 for a whole span.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir
from numba.core import types

from service.engine.backends.cpu_kernels.codes import ROUNDER, Sums, in_range, integer_steps, nf4_index
from service.engine.backends.cpu_kernels.minifloats import nearest, of_element
from service.engine.backends.cpu_kernels.spans import AHEAD, KIND_BF16, KIND_F16, KIND_F32, SPAN
from service.engine.backends.cpu_kernels.vector import (
    F16,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    LANES,
    Memory,
    State,
    Vec,
    either,
    emitted,
    loop,
    processor_has,
    zeros,
)
from service.engine.schemes.codebook import NF4_TABLE
from service.engine.schemes.minifloat import MiniFloat

#: Elements that are worked on together.
PAIR = 2 * LANES
#: The smallest group that lies in them whole.
HALF_PAIR = LANES
#: What the cache fetches at once.
LINE_BYTES = 64
#: Float32 sums of a span, each of LANES parts: x², y², d², largest |d|.
PARTS = 4
#: Elements whose squares one lane of float32 adds up in a row, at most sixteen to a lane: keeps rounding small.
RUN = 16 * PAIR

KINDS = (KIND_F32, KIND_F16, KIND_BF16)
_EVEN, _ODD = range(0, PAIR, 2), range(1, PAIR, 2)
_P, _F = types.intp, types.float32


def _read_pair(builder: ir.IRBuilder, source: ir.Value, kind: int) -> Callable[[ir.Value], tuple[Vec, Vec]]:
    """A function from the index of an element to the pair of float32 vectors that begins there."""
    memory = Memory(builder, source, F32 if kind == KIND_F32 else I16)

    item = 4 if kind == KIND_F32 else 2

    def read(i: ir.Value) -> tuple[Vec, Vec]:
        # While codes are computed, memory brings the span after this one.
        for line in range(0, PAIR * item, LINE_BYTES):
            memory.prefetch(i, SPAN * item + line)
        both = memory.load(i, PAIR)
        if kind == KIND_BF16:
            words = both.cast(I32)
            return (words << 16).cast(F32), (words & words.const(0xFFFF0000)).cast(F32)
        # Halves are widened first: what lies side by side in memory is converted as it is loaded.
        floats = both if kind == KIND_F32 else both.cast(F16).widen(F32)
        return floats.shuffle(_EVEN), floats.shuffle(_ODD)

    return read


def _range_of_floats(builder: ir.IRBuilder, source: ir.Value, count: ir.Value) -> tuple[Vec, Vec]:
    x = Memory(builder, source, F32)

    def step(i: ir.Value, state: State) -> State:
        x.prefetch(i, AHEAD)
        value = x.load(i)
        return [value.min(state[0]), value.max(state[1])]

    low, high = loop(builder, count, LANES, [zeros(builder), zeros(builder)], step)
    below, above = reduce_both(low.const(-0.0) - low, high, Vec.max)
    return below.const(-0.0) - below, above


def _range_of_patterns(
    builder: ir.IRBuilder, source: ir.Value, count: ir.Value, kind: int, lanes: int
) -> tuple[Vec, Vec]:
    """Of 16-bit floats without converting them: as integers the largest is the largest number, and as unsigned
    ones the smallest number, if its sign bit is set. A NaN or an infinity comes out as one."""
    x = Memory(builder, source, I16)

    def larger(a: Vec, b: Vec) -> Vec:
        return a.largest(b, signed=True)

    def step(i: ir.Value, state: State) -> State:
        value = x.load(i, lanes)
        return [value.largest(state[0], signed=False), larger(value, state[1])]

    start = [zeros(builder, I16, lanes), zeros(builder, I16, lanes)]
    below, above = loop(builder, count, lanes, start, step)
    sign = below.const(-(1 << 15))
    low, high = reduce_both(below.xor(sign), above, larger)
    low = low.xor(low.const(-(1 << 15)))
    low = low.negative().select(low, low.const(0))
    return _number(low, kind), _number(high, kind)


def _magnitude(builder: ir.IRBuilder, source: ir.Value, count: ir.Value, kind: int, lanes: int) -> tuple[Vec, Vec]:
    """The range about 0 that holds all: for grids that ask for the largest magnitude, found in half the time."""
    x = Memory(builder, source, F32 if kind == KIND_F32 else I16)

    def step(i: ir.Value, state: State) -> State:
        if kind == KIND_F32:
            x.prefetch(i, AHEAD)
            return [state[0].largest_magnitude(x.load(i))]
        pattern = x.load(i, lanes)
        return [larger(pattern & pattern.const(0x7FFF), state[0])]

    def larger(a: Vec, b: Vec) -> Vec:
        return a.max(b) if kind == KIND_F32 else a.largest(b, signed=False)

    if kind == KIND_F32:
        (found,) = loop(builder, count, LANES, [zeros(builder)], step)
        largest = found.reduce(larger)
    else:
        (found,) = loop(builder, count, lanes, [zeros(builder, I16, lanes)], step)
        largest = _number(found.reduce(larger), kind)
    return largest.const(-0.0) - largest, largest


def reduce_both(a: Vec, b: Vec, combine: Callable[[Vec, Vec], Vec]) -> tuple[Vec, Vec]:
    """All lanes of `a` folded into one, and all of `b`, side by side."""
    count = a.type.count
    half = count // 2
    folded = [combine(v.shuffle(range(half)), v.shuffle(range(half, count))) for v in (a, b)]
    both = folded[0].beside(folded[1])
    while half > 1:
        half //= 2
        both = combine(both, both.shuffle([lane ^ half for lane in range(count)]))
    return both.lane(0), both.lane(count // 2)


def _number(pattern: Vec, kind: int) -> Vec:
    """The float32 of a 16-bit pattern."""
    builder = pattern.builder
    if kind == KIND_F16:
        return Vec(builder, builder.fpext(builder.bitcast(pattern.value, F16), F32))
    wide = builder.shl(builder.zext(pattern.value, I32), ir.Constant(I32, 16))
    return Vec(builder, builder.bitcast(wide, F32))


def _for_each_kind(builder: ir.IRBuilder, kind: ir.Value, emit: Callable[[int], None]) -> None:
    """Code for every kind of element, of which the one runs that the input has."""
    for each in KINDS:
        with builder.if_then(builder.icmp_signed("==", kind, ir.Constant(I64, each))):
            emit(each)


@emitted(types.none, _P, _P, _P, _P, types.boolean, _P, _P)
def store_ranges(builder, source, kind, count, group, symmetric, lows, highs):
    """Write smallest and largest of zero and each `group` of `count` elements (whole pairs, groups perhaps half).

    `symmetric`: the larger magnitude of both as both.
    """
    low, high = Memory(builder, lows, F32), Memory(builder, highs, F32)

    def emit(each: int, lanes: int) -> None:
        def step(first: ir.Value, state: State) -> State:
            left = builder.sub(count, first)
            size = builder.select(builder.icmp_signed("<", left, group), left, group)
            item = ir.Constant(I64, 4 if each == KIND_F32 else 2)
            place = builder.add(source, builder.mul(first, item))

            def find(is_symmetric: bool) -> State:
                if is_symmetric:
                    return list(_magnitude(builder, place, size, each, lanes))
                if each == KIND_F32:
                    return list(_range_of_floats(builder, place, size))
                return list(_range_of_patterns(builder, place, size, each, lanes))

            found = either(builder, symmetric, find)
            (number,) = state
            for memory, value in zip((low, high), found, strict=True):
                memory.store(number.value, value)
            return [number.plus(number.const(1))]

        loop(builder, count, group, [Vec(builder, ir.Constant(I64, 0))], step)

    def emit_for_size(each: int) -> None:
        with builder.if_else(builder.icmp_signed("<", group, ir.Constant(I64, PAIR))) as (half, whole):
            with half:
                emit(each, HALF_PAIR)
            with whole:
                emit(each, PAIR)

    _for_each_kind(builder, kind, emit_for_size)


#: What codes are made of, and the value that they stand for.
Rule = Callable[[Vec], tuple[Vec, Vec]]
#: 32-bit lanes of two codes, the even one in the low bits.
Join = Callable[[Vec, Vec], Vec]


@dataclass(frozen=True, slots=True)
class Grids:
    """Where the grids of a run of elements are.

    Each serves `group` elements, a pair or more, and the next is `step` further on. Where a pair is two groups, the
    grid of its second half is `second` further on than that of the first, else 0. `fits` is as of `make_grids`.
    """

    scales: Memory
    zeros: Memory
    fits: Memory
    group: ir.Value
    step: ir.Value
    second: ir.Value
    may_fit: ir.Value

    @classmethod
    def of(
        cls, builder: ir.IRBuilder, scales: ir.Value, zeros: ir.Value, fits: ir.Value, group: ir.Value, step: ir.Value,
        *, alone: bool = False,
    ) -> Grids:  # fmt: skip
        """From arguments: three addresses; the elements that a grid serves, from HALF_PAIR on; and its distance.

        `alone`: none fits that shares a pair with another.
        """
        pair, nothing = ir.Constant(I64, PAIR), ir.Constant(I64, 0)
        halves = builder.icmp_signed("<", group, pair)
        return cls(
            Memory(builder, scales, F32),
            Memory(builder, zeros, F32),
            Memory(builder, fits, F32),
            builder.select(halves, pair, group),
            builder.select(halves, builder.add(step, step), step),
            builder.select(halves, step, nothing),
            builder.not_(halves) if alone else ir.Constant(I1, 1),
        )

    def at(self, index: ir.Value) -> tuple[Vec, Vec, Vec]:
        """Scale, its reciprocal and zero point for the lanes of a pair."""
        ones, others = self._lanes(index), self._lanes(self.scales.builder.add(index, self.second))
        halves = [*range(LANES // 2), *range(LANES, LANES + LANES // 2)]
        scales, inverses, zero_points = (a.mixed(b, halves) for a, b in zip(ones, others, strict=True))
        return scales, inverses, zero_points

    def fit(self, index: ir.Value) -> ir.Value:
        """Whether those of a pair fit."""
        other = self.scales.builder.add(index, self.second)
        smaller = self.fits.load(index, 1).min(self.fits.load(other, 1))
        return self.scales.builder.and_((smaller > smaller.const(0.0)).value, self.may_fit)

    def _lanes(self, index: ir.Value) -> list[Vec]:
        scale, zero = self.scales.load(index, 1), self.zeros.load(index, 1)
        return [value.splat() for value in (scale, scale.const(1.0) / scale, zero)]


def _encode(
    builder: ir.IRBuilder, source: ir.Value, kind: int, count: ir.Value, grids: Grids, target: ir.Value,
    parts: ir.Value, bits: int, rule_of: Callable[[bool, Vec, Vec, Vec], tuple[Rule, Join]],
    *, has_fits: bool = True,
) -> None:  # fmt: skip
    """Write codes of `bits` (4 or 8), and add what they lose to `parts`.

    `rule_of` is told whether a grid fits, and what `Grids.at` gives; without `has_fits` it is not asked for.
    """
    read, outputs, sums = _read_pair(builder, source, kind), Memory(builder, target, I8), Memory(builder, parts, F32)

    def group(first: ir.Value, state: State) -> State:
        at = state[0]
        grid = grids.at(at.value)

        def encode(fits: bool) -> State:
            rule, join = rule_of(fits, *grid)

            def step(inside: ir.Value, state: State) -> State:
                i = builder.add(first, inside)
                codes, after = [], []
                for x, part in zip(read(i), (state[:PARTS], state[PARTS:]), strict=True):
                    code, value = rule(x)
                    codes.append(code)
                    after += Sums.add_block(part, x, value)
                outputs.store(builder.udiv(i, ir.Constant(I64, 8 // bits)), join(*codes).narrow(ir.IntType(2 * bits)))
                return after

            return loop(builder, size, PAIR, state[1:], step)

        left = builder.sub(count, first)
        size = builder.select(builder.icmp_signed("<", left, grids.group), left, grids.group)
        found = either(builder, grids.fit(at.value), encode, likely=True) if has_fits else encode(False)
        return [Vec(builder, builder.add(at.value, grids.step)), *found]

    start = [Vec(builder, ir.Constant(I64, 0)), *(zeros(builder) for _ in range(2 * PARTS))]
    _, *found = loop(builder, count, grids.group, start, group)
    for n, (even, odd) in enumerate(zip(found[:PARTS], found[PARTS:], strict=True)):
        where = ir.Constant(I64, n * LANES)
        before = sums.load(where)
        sums.store(where, before.max(even.max(odd)) if n == PARTS - 1 else before + (even + odd))


def _encode_integer(
    builder: ir.IRBuilder, source: ir.Value, kind: ir.Value, count: ir.Value, grids: Grids, top: ir.Value,
    target: ir.Value, parts: ir.Value, bits: int,
) -> None:  # fmt: skip
    tops = Vec(builder, top).splat()

    def rule_of(fits: bool, scales: Vec, inverses: Vec, offsets: Vec) -> tuple[Rule, Join]:
        rounder = tops.const(ROUNDER)
        lowest, highest, moved = offsets.const(0.0) - offsets, tops - offsets, scales.const(0.0) - rounder * scales

        def rule(x: Vec) -> tuple[Vec, Vec]:
            if not (fits and processor_has("fma")):
                steps, level = integer_steps(x, inverses, lowest, highest)
                return steps, level * scales
            # What is fused is exact.
            steps = x * inverses + rounder
            return steps.cast(I32), steps.fma(scales, moved)

        zero = offsets.to_int(I32)
        return rule, lambda even, odd: (odd << bits).plus(even).plus(zero.plus(zero << bits))

    _for_each_kind(
        builder, kind, lambda each: _encode(builder, source, each, count, grids, target, parts, bits, rule_of)
    )


@emitted(types.none, _P, _P, _P, _P, _P, _P, _P, _P, _F, _P, _P)
def encode_integer_4(builder, source, kind, count, scales, zero_points, fits, group, step, top, target, parts):
    """`count` elements (whole pairs) on integer grids (see `Grids`), two codes to a byte."""
    grids = Grids.of(builder, scales, zero_points, fits, group, step)
    _encode_integer(builder, source, kind, count, grids, top, target, parts, 4)


@emitted(types.none, _P, _P, _P, _P, _P, _P, _P, _P, _F, _P, _P)
def encode_integer_8(builder, source, kind, count, scales, zero_points, fits, group, step, top, target, parts):
    """`count` elements (whole pairs) on integer grids, a byte for each code."""
    grids = Grids.of(builder, scales, zero_points, fits, group, step)
    _encode_integer(builder, source, kind, count, grids, top, target, parts, 8)


@emitted(types.none, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P)
def encode_nf4_4(builder, source, kind, count, scales, zero_points, fits, group, step, target, parts):
    """`count` elements (whole pairs) on the NF4 table, two codes to a byte."""
    table = Vec(builder, ir.Constant(ir.VectorType(F32, LANES), NF4_TABLE.tolist()))
    grids = Grids.of(builder, scales, zero_points, fits, group, step, alone=True)

    def rule_of(fits: bool, scales: Vec, inverses: Vec, _: Vec) -> tuple[Rule, Join]:
        values = table * scales

        def rule(x: Vec) -> tuple[Vec, Vec]:
            index = nf4_index(x * inverses, near=fits)
            return index, index.look_up(values) if fits else index.look_up(table) * scales

        return rule, lambda even, odd: (odd << 4).plus(even)

    _for_each_kind(builder, kind, lambda each: _encode(builder, source, each, count, grids, target, parts, 4, rule_of))


@emitted(types.none, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P)
def encode_floats_packed(builder, table, source, kind, count, scales, zero_points, fits, group, step, target, parts):
    """`count` elements (whole pairs) as small floating-point numbers, two codes to a byte if they have 4 bits."""
    grids = Grids.of(builder, scales, zero_points, fits, group, step)

    def encode(element: MiniFloat) -> State:
        def rule_of(_: bool, scales: Vec, inverses: Vec, __: Vec) -> tuple[Rule, Join]:
            def rule(x: Vec) -> tuple[Vec, Vec]:
                code, value = nearest(x * inverses, element)
                return code, value * scales

            return rule, lambda even, odd: (odd << element.bits).plus(even)

        _for_each_kind(
            builder,
            kind,
            lambda each: _encode(
                builder, source, each, count, grids, target, parts, element.bits, rule_of, has_fits=False
            ),
        )
        return []

    of_element(builder, table, encode)


@emitted(types.none, _P)
def clear(builder, parts):
    """No sums yet."""
    memory = Memory(builder, parts, F32)
    for n in range(PARTS):
        memory.store(ir.Constant(I64, n * LANES), zeros(builder))


@emitted(types.boolean, _P, _P)
def settle(builder, parts, sums):
    """Add the parts to the float64 sums; False, and nothing done, where they have left the range of float32."""
    memory = Memory(builder, parts, F32)
    found = [memory.load(ir.Constant(I64, n * LANES)) for n in range(PARTS)]
    usual = in_range(found)
    with builder.if_then(usual.value, likely=True):
        Sums(builder, sums).store_block(found)
    return usual
