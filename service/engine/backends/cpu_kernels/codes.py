"""Codes of a group on its grid, and in the same pass what they lose."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import types

from service.engine.backends.cpu_kernels.vector import F32, F64, I8, I32, I64, LANES, Memory, State, Vec, emitted, loop
from service.engine.schemes.codebook import NF4_MIDPOINTS, NF4_TABLE

#: float64 sums in a row, each of LANES parts: x², y², xy, d², largest |d|.
SUMS = 5


class Sums:
    """The running sums of a tile, in memory between two groups and in registers within one."""

    def __init__(self, builder: ir.IRBuilder, address: ir.Value) -> None:
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


def _encode(
    builder: ir.IRBuilder,
    source: ir.Value,
    count: ir.Value,
    codes: ir.Value,
    sums: ir.Value,
    rule: Callable[[Vec], tuple[Vec, Vec]],
) -> None:
    """Write the codes that `rule` gives with their values, and add to the sums."""
    inputs, outputs, running = Memory(builder, source, F32), Memory(builder, codes, I8), Sums(builder, sums)

    def step(i: ir.Value, state: State) -> State:
        x = inputs.load(i)
        code, value = rule(x)
        outputs.store(i, code.narrow(I8))
        return running.add(state, x, value)

    running.store(loop(builder, count, LANES, running.load(), step))


def integer_level(x: Vec, inverse: Vec, lowest: Vec, highest: Vec) -> Vec:
    """clamp(rint(x * (1/s)) + z) - z: the clamp's ends moved by z instead of the number."""
    return (x * inverse).rint().max(lowest).min(highest)


_F = types.float32
_P = types.intp


@emitted(types.none, _P, _P, _F, _F, _F, _F, _P, _P)
def encode_integer(builder, source, count, inverse, scale, zero, top, codes, sums):
    """Codes of `count` float32 (whole vectors) on an integer grid."""
    inverses, scales, zeros, tops = (Vec(builder, v).splat() for v in (inverse, scale, zero, top))

    lowest, highest = zeros.const(0.0) - zeros, tops - zeros

    def rule(x: Vec) -> tuple[Vec, Vec]:
        level = integer_level(x, inverses, lowest, highest)
        return (level + zeros).to_int(I32), level * scales

    _encode(builder, source, count, codes, sums, rule)


def nf4_index(t: Vec) -> Vec:
    """Number of midpoints below t."""
    index = t.const(0.0)
    for midpoint in NF4_MIDPOINTS.tolist():
        index = index + (t > t.const(midpoint)).select(t.const(1.0), t.const(0.0))
    return index.to_int(I32)


@emitted(types.none, _P, _P, _F, _F, _P, _P)
def encode_nf4(builder, source, count, inverse, scale, codes, sums):
    """Codes of `count` float32 (whole vectors) on the NF4 table."""
    inverses, scales = (Vec(builder, v).splat() for v in (inverse, scale))
    table = Vec(builder, ir.Constant(ir.VectorType(F32, LANES), NF4_TABLE.tolist()))

    def rule(x: Vec) -> tuple[Vec, Vec]:
        index = nf4_index(x * inverses)
        return index, index.look_up(table) * scales

    _encode(builder, source, count, codes, sums, rule)


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
    builder: ir.IRBuilder, codes: ir.Value, count: ir.Value, target: ir.Value, rule: Callable[[Vec], Vec]
) -> None:
    inputs, outputs = Memory(builder, codes, I8), Memory(builder, target, F32)

    def step(i: ir.Value, state: State) -> State:
        outputs.store(i, rule(inputs.load(i).widen(I32)))
        return state

    loop(builder, count, LANES, [], step)


@emitted(types.none, _P, _P, _F, _F, _P)
def decode_integer(builder, codes, count, scale, zero, target):
    """What `count` codes (whole vectors) stand for on an integer grid."""
    scales, zeros = (Vec(builder, v).splat() for v in (scale, zero))
    _decode(builder, codes, count, target, lambda code: (code.to_float(F32) - zeros) * scales)


@emitted(types.none, _P, _P, _F, _P)
def decode_nf4(builder, codes, count, scale, target):
    """What `count` codes (whole vectors) stand for in the NF4 table."""
    scales = Vec(builder, scale).splat()
    table = Vec(builder, ir.Constant(ir.VectorType(F32, LANES), NF4_TABLE.tolist()))
    _decode(builder, codes, count, target, lambda code: code.look_up(table) * scales)


@emitted(types.none, _P, _P, _P)
def copy_floats(builder, source, count, target):
    """Copy exactly `count` float32."""
    inputs, outputs = Memory(builder, source, F32), Memory(builder, target, F32)

    def step(i: ir.Value, state: State) -> State:
        outputs.store(i, inputs.load(i, 1))
        return state

    loop(builder, count, 1, [], step)
