"""Codes of a group on its grid, and in the same pass what they lose."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types

from service.engine.backends.cpu_kernels.minifloats import nearest, number_of, of_element
from service.engine.backends.cpu_kernels.vector import (
    F32,
    F64,
    I8,
    I32,
    I64,
    LANES,
    Memory,
    State,
    Vec,
    emitted,
    loop,
    zeros,
)
from service.engine.schemes.codebook import NF4_MIDPOINTS, NF4_TABLE
from service.engine.schemes.minifloat import MiniFloat

#: float64 sums in a row, each of LANES parts: x², y², xy, d², largest |d|.
SUMS = 5


#: Between these a lane's sum of squares in float32 has neither overflowed nor lost anything that counts; a block
#: in which a lane is above, or all are below, is summed up in float64 throughout.
SMALLEST_SUM, LARGEST_SUM = 2.0**-60, 2.0**120
#: Columns of which squares are summed up in float32, sixteen to a lane, before they go to float64.
BLOCK = 256

#: Adding and subtracting it rounds a float32 below 2**22 half to even; larger ones end at the clamp anyway.
ROUNDER = 1.5 * 2.0**23
#: Bins from 0 to 1 that numbers fall into, by rounding: so narrow that none has two midpoints, and its edges apart from
#: them. As many as one permutation chooses from, by the low bits of a number that may be negative.
NF4_BINS, NF4_NEAR = 15, 1.02


def _nf4_bins() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """By bin, the midpoints below it, counted from ROUNDER; and the one that lies within, or infinity."""
    below, within = np.full(2 * LANES, ROUNDER, np.float32), np.full(2 * LANES, np.inf, np.float32)
    bins = np.rint(NF4_MIDPOINTS * np.float32(NF4_BINS)).astype(np.int64)
    for number in range(-LANES, LANES):
        below[number] += np.count_nonzero(bins < number)
        for midpoint in NF4_MIDPOINTS[bins == number]:
            within[number] = midpoint
    return below, within


_BELOW, _WITHIN = _nf4_bins()


class Sums:
    """The running sums of a tile, in memory between two groups and in registers within one."""

    def __init__(self, builder: ir.IRBuilder, address: ir.Value) -> None:
        self.builder = builder
        self.memory = Memory(builder, address, F64)

    def load(self) -> State:
        """All of them."""
        return [self.memory.load(ir.Constant(I64, i * LANES)) for i in range(SUMS)]

    def store(self, state: State) -> None:
        """Write them back."""
        for i, value in enumerate(state):
            self.memory.store(ir.Constant(I64, i * LANES), value)

    @staticmethod
    def add(state: State, x: Vec, y: Vec) -> State:
        """With float32 x and y added."""
        wide_x, wide_y = x.widen(F64), y.widen(F64)
        d = wide_x - wide_y
        return [
            wide_x.fma(wide_x, state[0]),
            wide_y.fma(wide_y, state[1]),
            wide_x.fma(wide_y, state[2]),
            d.fma(d, state[3]),
            d.abs().max(state[4]),
        ]

    @staticmethod
    def add_block(part: State, x: Vec, y: Vec) -> State:
        """x², y², d² and |d| of a block, in float32; the difference of close numbers is exact in it."""
        d = x - y
        return [x.fma(x, part[0]), y.fma(y, part[1]), d.fma(d, part[2]), part[3].largest_magnitude(d)]

    def store_block(self, part: State) -> None:
        """A block's sums added to the tile's; xy follows from the others."""
        xx, yy, xy, dd, largest = self.load()
        x, y, d, most = (p.widen(F64) for p in part)
        self.store([xx + x, yy + y, (x + y - d).fma(x.const(0.5), xy), dd + d, most.max(largest)])


def in_range(part: State) -> Vec:
    """Whether these sums of a block in float32 are good enough."""
    squares = part[0]
    most, some = (squares < squares.const(LARGEST_SUM)).all(), (squares > squares.const(SMALLEST_SUM)).any()
    return Vec(squares.builder, squares.builder.and_(most.value, some.value))


def encode(
    builder: ir.IRBuilder,
    source: ir.Value,
    count: ir.Value,
    codes: ir.Value,
    sums: ir.Value,
    rule: Callable[[Vec], tuple[Vec, Vec]],
) -> None:
    """Write the codes that `rule` gives with their values, and add to the sums."""
    inputs, outputs, running = Memory(builder, source, F32), Memory(builder, codes, I8), Sums(builder, sums)

    def quick(i: ir.Value, part: State) -> State:
        x = inputs.load(i)
        code, value = rule(x)
        outputs.store(i, code.narrow(I8))
        return running.add_block(part, x, value)

    def exact(i: ir.Value, state: State) -> State:
        x = inputs.load(i)
        return running.add(state, x, rule(x)[1])

    part = loop(builder, count, LANES, [zeros(builder) for _ in range(4)], quick)
    with builder.if_else(in_range(part).value, likely=True) as (usual, rare):
        with usual:
            running.store_block(part)
        with rare:
            running.store(loop(builder, count, LANES, running.load(), exact))


def integer_steps(x: Vec, inverse: Vec, lowest: Vec, highest: Vec, center: Vec | None = None) -> tuple[Vec, Vec]:
    """clamp(rint(x * (1/s)) + z) - z, as integers modulo 2**22, and less `center` as float32.

    The clamp's ends are moved by z instead of the number.
    """
    rounder = x.const(ROUNDER)
    shifted = (x * inverse + rounder).max(lowest + rounder).min(highest + rounder)
    return shifted.cast(I32), shifted - (rounder if center is None else rounder + center)


def nf4_index(t: Vec, *, near: bool = False) -> Vec:
    """Number of midpoints below t, in the low byte: those below its bin, and perhaps the one within.

    `near`: t is known to be no farther from 0 than NF4_NEAR.
    """
    bins = (t if near else t.within(t.const(1.0))).fma(t.const(NF4_BINS), t.const(ROUNDER)).cast(I32)
    kind = ir.VectorType(F32, len(_BELOW))
    below, within = (Vec(t.builder, ir.Constant(kind, table.tolist())) for table in (_BELOW, _WITHIN))
    # Counted as a float32 of which the last bit is worth 1: there is an instruction for that.
    first = bins.look_up(below)
    return (t > bins.look_up(within)).select(first + first.const(1.0), first).cast(I32)


_F = types.float32
_P = types.intp


@emitted(types.none, _P, _P, _F, _F, _F, _F, _P, _P)
def encode_integer(builder, source, count, inverse, scale, zero, top, codes, sums):
    """Codes of `count` float32 (whole vectors) on an integer grid."""
    inverses, scales, offsets, tops = (Vec(builder, v).splat() for v in (inverse, scale, zero, top))

    lowest, highest = offsets.const(0.0) - offsets, tops - offsets
    offset = offsets.to_int(I32)

    def rule(x: Vec) -> tuple[Vec, Vec]:
        steps, level = integer_steps(x, inverses, lowest, highest)
        return steps.plus(offset), level * scales

    encode(builder, source, count, codes, sums, rule)


@emitted(types.none, _P, _P, _F, _F, _P, _P)
def encode_nf4(builder, source, count, inverse, scale, codes, sums):
    """Codes of `count` float32 (whole vectors) on the NF4 table."""
    inverses, scales = (Vec(builder, v).splat() for v in (inverse, scale))
    table = Vec(builder, ir.Constant(ir.VectorType(F32, LANES), NF4_TABLE.tolist()))

    def rule(x: Vec) -> tuple[Vec, Vec]:
        index = nf4_index(x * inverses)
        return index, index.look_up(table) * scales

    encode(builder, source, count, codes, sums, rule)


@emitted(types.none, _P, _P, _P, _F, _F, _P, _P)
def encode_floats(builder, table, source, count, inverse, scale, codes, sums):
    """Codes of `count` float32 (whole vectors) as small floating-point numbers."""
    inverses, scales = (Vec(builder, v).splat() for v in (inverse, scale))

    def with_element(element: MiniFloat) -> State:
        def rule(x: Vec) -> tuple[Vec, Vec]:
            code, value = nearest(x * inverses, element)
            return code, value * scales

        encode(builder, source, count, codes, sums, rule)
        return []

    of_element(builder, table, with_element)


@emitted(types.none, _P, _P, _P, _P)
def add_sums(builder, first, second, count, sums):
    """Add `count` pairs of float32 (whole vectors) to the sums."""
    x, y, running = Memory(builder, first, F32), Memory(builder, second, F32), Sums(builder, sums)
    running.store(
        loop(builder, count, LANES, running.load(), lambda i, state: running.add(state, x.load(i), y.load(i)))
    )


@emitted(types.float64, _P, _P)
def sum_of(builder, sums, index):
    """Sum number `index`, its parts added up."""
    at = builder.mul(index, ir.Constant(I64, LANES))
    return Memory(builder, sums, F64).load(at).reduce(Vec.__add__)


@emitted(types.float64, _P)
def largest_of(builder, sums):
    """The largest difference."""
    return Memory(builder, sums, F64).load(ir.Constant(I64, (SUMS - 1) * LANES)).reduce(Vec.max)


def _decode(
    builder: ir.IRBuilder, codes: ir.Value, count: ir.Value, target: ir.Value, stream: ir.Value,
    rule: Callable[[Vec], Vec],
) -> None:  # fmt: skip
    inputs, outputs = Memory(builder, codes, I8), Memory(builder, target, F32)

    def write(store: Callable[[ir.Value, Vec], None]) -> None:
        def step(i: ir.Value, state: State) -> State:
            store(i, rule(inputs.load(i).widen(I32)))
            return state

        loop(builder, count, LANES, [], step)

    aligned = builder.icmp_signed("==", builder.and_(target, ir.Constant(I64, 63)), ir.Constant(I64, 0))
    with builder.if_else(builder.and_(stream, aligned)) as (past, through):
        with past:
            write(outputs.stream)
        with through:
            write(outputs.store)


@emitted(types.none, _P, _P, _F, _F, _P, types.boolean)
def decode_integer(builder, codes, count, scale, zero, target, stream):
    """What `count` codes (whole vectors) stand for on an integer grid; `stream`: past the cache, if it can be."""
    scales, offsets = (Vec(builder, v).splat() for v in (scale, zero))
    _decode(builder, codes, count, target, stream, lambda code: (code.to_float(F32) - offsets) * scales)


@emitted(types.none, _P, _P, _F, _P, types.boolean)
def decode_nf4(builder, codes, count, scale, target, stream):
    """What `count` codes (whole vectors) stand for in the NF4 table; `stream` as above."""
    scales = Vec(builder, scale).splat()
    table = Vec(builder, ir.Constant(ir.VectorType(F32, LANES), NF4_TABLE.tolist()))
    _decode(builder, codes, count, target, stream, lambda code: code.look_up(table) * scales)


@emitted(types.none, _P, _P, _P, _F, _P, types.boolean)
def decode_floats(builder, table, codes, count, scale, target, stream):
    """What `count` codes (whole vectors) of small floating-point numbers stand for; `stream` as above."""
    scales = Vec(builder, scale).splat()

    def decode(element: MiniFloat) -> State:
        _decode(builder, codes, count, target, stream, lambda code: number_of(code, element) * scales)
        return []

    of_element(builder, table, decode)


@emitted(types.none)
def settle_streams(builder):
    """What went past the cache is seen by every thread that is told of it afterwards."""
    builder.fence("seq_cst")


@emitted(types.none, _P, _P, _P)
def copy_floats(builder, source, count, target):
    """Copy exactly `count` float32."""
    inputs, outputs = Memory(builder, source, F32), Memory(builder, target, F32)

    def step(i: ir.Value, state: State) -> State:
        outputs.store(i, inputs.load(i, 1))
        return state

    loop(builder, count, 1, [], step)
