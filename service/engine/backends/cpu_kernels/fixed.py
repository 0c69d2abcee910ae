"""Groups as 16-bit fixed point: two elements to a 32-bit lane, thirty-two to an instruction.

A group's elements are multiples of its unit, of which the largest has LARGEST_ELEMENT. On them a grid's sums are whole
numbers, and exact. They choose among grids; what the chosen one loses is measured on the elements themselves.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit
from numba.core import types

from service.engine.backends.cpu_kernels.pairs import reduce_both
from service.engine.backends.cpu_kernels.spans import SPAN, as_f32, whole_vectors
from service.engine.backends.cpu_kernels.vector import (
    F32,
    F64,
    I16,
    I32,
    I64,
    LANES,
    Memory,
    State,
    Vec,
    call,
    emitted,
    loop,
    processor_has,
    zeros,
)

#: Pairs of elements after which sums leave 32 bits: 256 products of 15 bits and 8 bits fit in.
CHUNK = 128
#: Steps that an inner loop makes at a time, each with sums of its own, as one waits for itself. Divides CHUNK.
UNROLL = 2
LARGEST_ELEMENT = 32767
#: Bits of a mantissa that a multiplier keeps.
MULTIPLIER_BITS = 15

_P = types.intp


def _by_halves(name: str, returns: ir.Type, a: Vec, b: Vec) -> Vec:
    """An instruction of 32 bytes on 64, one half after the other."""
    half = a.type.count // 2
    parts = [
        Vec(a.builder, call(a.builder, name, returns, *(v.shuffle(range(at, at + half)).value for v in (a, b))))
        for at in (0, half)
    ]
    return parts[0].beside(parts[1])


def scaled(a: Vec, b: Vec) -> Vec:
    """rint(a * b / 2**15) of 16-bit integers, half up."""
    if processor_has("avx512bw"):
        return Vec(a.builder, call(a.builder, "llvm.x86.avx512.pmul.hr.sw.512", a.type, a.value, b.value))
    if processor_has("avx2"):
        return _by_halves("llvm.x86.avx2.pmul.hr.sw", ir.VectorType(I16, a.type.count // 2), a, b)
    product = a.widen_signed(I32).times(b.widen_signed(I32))
    return (product.plus(product.const(1 << 14)) >> 15).narrow(I16)


def paired_sum(a: Vec, b: Vec) -> Vec:
    """The sums of two neighbouring products each, 32 bits wide."""
    wide = ir.VectorType(I32, a.type.count // 2)
    if processor_has("avx512bw"):
        return Vec(a.builder, call(a.builder, "llvm.x86.avx512.pmaddw.d.512", wide, a.value, b.value))
    if processor_has("avx2"):
        return _by_halves("llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, wide.count // 2), a, b)
    x, y = a.cast(I32), b.cast(I32)
    low = (x << 16).shift_signed(16).times((y << 16).shift_signed(16))
    return low.plus(x.shift_signed(16).times(y.shift_signed(16)))


def twice(value: Vec) -> Vec:
    """Integers, the low 16 bits of 32-bit lanes, in both halves of the lane."""
    low = value & value.const(0xFFFF)
    return (low | (low << 16)).cast(I16)


def factors(levels: Vec) -> tuple[Vec, Vec]:
    """Two 16-bit factors that make levels of elements: `levels` of them to a unit, positive and below 1/4.

    The first takes all bits that a product has room for, the second takes it down to whole levels.
    """
    pattern = levels.cast(I32)
    mantissa = (pattern & pattern.const(0x7FFFFF)) | pattern.const(0x800000)
    drop = 24 - MULTIPLIER_BITS
    first = (mantissa.plus(mantissa.const(1 << (drop - 1))) >> drop).smallest(mantissa.const(0x7FFF))
    exponent = (pattern >> 23).largest(pattern.const(111), signed=True).smallest(pattern.const(125))
    second = pattern.const(1).shift_by(exponent.plus(pattern.const(-111)))
    return twice(first), twice(second)


def measure(source: ir.Value, pairs: ir.Value, levels: Vec, lowest: Vec, highest: Vec) -> tuple[Vec, Vec, Vec]:
    """Σ level, Σ level², Σ level·element of each lane's group, in float64; elements in units.

    There are `levels` levels to a unit; the lowest and highest are as float32.
    """
    builder = levels.builder
    x = Memory(builder, source, I32)
    first, second = factors(levels)
    low, high = (twice(v.to_int(I32)) for v in (lowest, highest))
    ones = low.const(1)
    chunk = ir.Constant(I64, CHUNK)

    def step(i: ir.Value, state: State) -> State:
        sums = []
        for k in range(UNROLL):
            at = builder.mul(builder.add(i, ir.Constant(I64, k)), ir.Constant(I64, LANES))
            value = x.load(builder.add(base[0], at)).cast(I16)
            level = scaled(scaled(value, first), second).largest(low, signed=True).smallest(high)
            for n, other in enumerate((ones, level, value)):
                sums.append(state[3 * k + n].plus(paired_sum(level, other)))
        return sums

    base: list[ir.Value] = []

    def whole(i: ir.Value, state: State) -> State:
        base[:] = [builder.mul(i, ir.Constant(I64, LANES))]
        left = builder.sub(pairs, i)
        count = builder.select(builder.icmp_signed("<", left, chunk), left, chunk)
        found = loop(builder, count, UNROLL, [zeros(builder, I32) for _ in range(3 * UNROLL)], step)
        sums = [sum_of(found[n::3]) for n in range(3)]
        return [total + part.signed_to_float(F64) for total, part in zip(state, sums, strict=True)]

    def sum_of(parts: State) -> Vec:
        total = parts[0]
        for part in parts[1:]:
            total = total.plus(part)
        return total

    a, b, c = loop(builder, pairs, CHUNK, [zeros(builder, F64) for _ in range(3)], whole)
    return a, b, c


@emitted(types.none, _P, _P, _P, _P)
def widen_range(builder, source, count, low, high):
    """Widen the range at `low` and `high` by `count` float32 (whole vectors)."""
    x, first = Memory(builder, source, F32), ir.Constant(I64, 0)
    lowest, highest = Memory(builder, low, F32), Memory(builder, high, F32)

    def step(i: ir.Value, state: State) -> State:
        value = x.load(i)
        return [value.min(state[0]), value.max(state[1])]

    start = [memory.load(first, 1).splat() for memory in (lowest, highest)]
    smallest, largest = loop(builder, count, LANES, start, step)
    below, above = reduce_both(smallest.const(0.0) - smallest, largest, Vec.max)
    lowest.store(first, below.const(0.0) - below)
    highest.store(first, above)


@emitted(types.none, _P, _P, _P, _P, _P, _P, _P)
def fix(builder, source, count, low, high, target, unit, total):
    """Write `count` float32 (whole vectors) as fixed point into one lane, LANES apart, with their unit and sum.

    The range is that of the whole group; `total`, a float64, is added to.
    """
    x, first = Memory(builder, source, F32), ir.Constant(I64, 0)
    lowest, highest = (Memory(builder, address, F32).load(first, 1).splat() for address in (low, high))
    # Where less than that is the largest, its elements have fewer bits, and none would do for its scale.
    largest = (lowest.const(0.0) - lowest).max(highest).max(lowest.const(2.0**-126))
    up, bound = lowest.const(1.0) / largest, lowest.const(LARGEST_ELEMENT)

    def step(i: ir.Value, state: State) -> State:
        value = (x.load(i) * up * bound).rint().to_int(I32)
        both = value.narrow(I16).cast(I32)
        for k in range(LANES // 2):
            at = builder.add(builder.mul(i, ir.Constant(I64, LANES // 2)), ir.Constant(I64, k * LANES))
            Memory(builder, target, I32).store(at, both.lane(k))
        return [state[0] + value.signed_to_float(F64)]

    (found,) = loop(builder, count, LANES, [zeros(builder, F64)], step)
    Memory(builder, unit, F32).store(first, (largest / bound).lane(0))
    _add(builder, total, found)


@emitted(types.none, _P, _P, _P, _P)
def add_to_total(builder, source, count, unit, total):
    """Add up `count` float32 (whole vectors), of which the unit is 1."""
    x = Memory(builder, source, F32)
    (found,) = loop(builder, count, LANES, [zeros(builder, F64)], lambda i, state: [state[0] + x.load(i).widen(F64)])
    Memory(builder, unit, F32).store(ir.Constant(I64, 0), Vec(builder, ir.Constant(F32, 1.0)))
    _add(builder, total, found)


def _add(builder: ir.IRBuilder, total: ir.Value, parts: Vec) -> None:
    memory, first = Memory(builder, total, F64), ir.Constant(I64, 0)
    memory.store(first, memory.load(first, 1) + parts.reduce(Vec.__add__))


@njit(nogil=True)
def fix_group(
    x: int, kind: int, first: int, count: int, target: int, low: int, high: int, unit: int, total: int, scratch: int
) -> None:
    """Elements [first, first + count) into the lane at `target`, and what is to be known of them into others.

    `low`, `high` and `total` hold zeros before. Up to the next multiple of LANES, the lane is filled with zeros.
    """
    for start in range(0, count, SPAN):
        n = min(SPAN, count - start)
        widen_range(as_f32(x, kind, first + start, n, scratch), whole_vectors(n), low, high)
    for start in range(0, count, SPAN):
        n = min(SPAN, count - start)
        span = as_f32(x, kind, first + start, n, scratch)
        fix(span, whole_vectors(n), low, high, target + 2 * LANES * start, unit, total)
