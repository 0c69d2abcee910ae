"""Ranges to scales and zero points as stored: sixteen groups at a time, one in each lane."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
from llvmlite import ir
from numba.core import types

from service.engine.backends.cpu_kernels.codes import NF4_NEAR
from service.engine.backends.cpu_kernels.minifloats import MANTISSA, nearest
from service.engine.backends.cpu_kernels.vector import (
    F16,
    F32,
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
)
from service.engine.schemes.base import SCALE_DTYPES, SCALE_LIMITS, PlainScaleDtype
from service.engine.schemes.minifloat import E4M3
from service.engine.schemes.nested import SMALLEST_SUPER

#: Scale dtypes as the kernels number them.
SCALE_KINDS = {name: number for number, name in enumerate(SCALE_DTYPES)}
#: Those of two bytes or more.
PLAIN_KINDS = {name: SCALE_KINDS[name] for name in get_args(PlainScaleDtype)}

#: Bits that a level takes, and that a scale has to leave of its mantissa where their product is to be exact.
LEVEL_BITS = 10

_P = types.intp
#: What the kernels know of a scheme: see `Form`.
FORM = (types.float32, types.float32, types.float32, types.boolean, _P, types.float32)


@dataclass(frozen=True, slots=True)
class Form:
    """A scheme in the code being emitted.

    A scale is (the range or, if symmetric, the largest magnitude) / divisor; codes end at `top`;
    `implied` is the zero point where none is stored. What is stored for a scale of 8 bits is `under` times it.
    """

    divisor: Vec
    top: Vec
    implied: Vec
    symmetric: ir.Value
    scale_kind: ir.Value
    under: Vec

    @classmethod
    def of(cls, builder: ir.IRBuilder, values: tuple[ir.Value, ...]) -> Form:
        """From the arguments that FORM describes."""
        divisor, top, implied = (Vec(builder, v).splat() for v in values[:3])
        return cls(divisor, top, implied, values[3], values[4], Vec(builder, values[5]).splat())

    def span(self, low: Vec, high: Vec) -> Vec:
        """What the divisor divides."""
        zero = low.const(0.0)
        return self.either((zero - low).max(high), high - low)

    def grid(self, low: Vec, high: Vec) -> tuple[Vec, Vec, Vec]:
        """`Scheme.grid`, and the reciprocal of its scale."""
        scale = self.store_scale(self.span(low, high) / self.divisor)
        inverse = scale.const(1.0) / scale
        return scale, self.zero_point(scale.const(0.0) - low, inverse), inverse

    def zero_point(self, offset: Vec, inverse: Vec) -> Vec:
        """clip(rint(offset * (1/s)), 0, top), or the implied one."""
        z = (offset * inverse).rint().max(offset.const(0.0)).min(self.top)
        return self.either(self.implied, z)

    def either(self, symmetric: Vec, asymmetric: Vec) -> Vec:
        """One or the other, as the scheme is."""
        return Vec(symmetric.builder, symmetric.builder.select(self.symmetric, symmetric.value, asymmetric.value))

    def store_scale(self, scale: Vec) -> Vec:
        """`Scheme.store_scale`."""
        is_plain = scale.builder.icmp_signed("<", self.scale_kind, ir.Constant(I64, len(PLAIN_KINDS)))
        (stored,) = either(
            scale.builder, is_plain, lambda plain: [self._plain(scale) if plain else self._small(scale)], likely=True
        )
        return stored

    def _small(self, scale: Vec) -> Vec:
        """Of 8 bits: an E4M3 under `under`, or the nearest power of two."""
        one, (smallest, largest) = scale.const(1.0), SCALE_LIMITS["E8M0"]
        bounded = scale.max(scale.const(smallest)).min(scale.const(largest)).cast(I32)
        power = (bounded.plus(bounded.const(1 << (MANTISSA - 1))) & bounded.const(0x7F800000)).cast(F32)
        is_zero, (smallest, largest) = scale.equals(scale.const(0.0)), SCALE_LIMITS["E4M3"]
        scaled = is_zero.select(one, scale * self.under).max(scale.const(smallest)).min(scale.const(largest))
        is_power = scale.builder.icmp_signed("==", self.scale_kind, ir.Constant(I64, SCALE_KINDS["E8M0"]))
        under = nearest(scaled, E4M3)[1] / self.under
        return Vec(scale.builder, scale.builder.select(is_power, is_zero.select(one, power).value, under.value))

    def _plain(self, scale: Vec) -> Vec:
        stored = scale.const(SCALE_LIMITS["F32"][0])
        for name, kind in PLAIN_KINDS.items():
            smallest, largest = (scale.const(float(np.float32(v))) for v in SCALE_LIMITS[name])
            rounded = _ROUND[name](scale.max(smallest).min(largest))
            chosen = scale.builder.icmp_signed("==", self.scale_kind, ir.Constant(I64, kind))
            stored = Vec(scale.builder, scale.builder.select(chosen, rounded.value, stored.value))
        return scale.equals(scale.const(0.0)).select(scale.const(1.0), stored)


def _without_last_bits(value: Vec, dropped: int) -> Vec:
    """A positive float32 rounded half to even to what is left of its mantissa."""
    pattern = value.cast(I32)
    odd = (pattern >> dropped) & pattern.const(1)
    rounded = pattern.plus(odd).plus(pattern.const((1 << (dropped - 1)) - 1))
    return ((rounded >> dropped) << dropped).cast(F32)


def _to_half(value: Vec) -> Vec:
    # Between 1/2 and 1 a float32 has just the step of a subnormal half.
    subnormal = (value + value.const(0.5)) - value.const(0.5)
    return (value < value.const(2.0**-14)).select(subnormal, _without_last_bits(value, 13))


_ROUND = {"F32": lambda v: v, "F16": _to_half, "BF16": lambda v: _without_last_bits(v, 16)}


@emitted(types.float32, types.float32, _P)
def store_super(builder: ir.IRBuilder, scale: ir.Value, kind: ir.Value) -> Vec:
    """`NestedScheme.store_super`."""
    given = Vec(builder, scale).splat()
    stored = given
    for name, number in PLAIN_KINDS.items():
        smallest, largest = SCALE_LIMITS[name]
        bounds = (given.const(float(np.float32(v))) for v in (max(smallest, SMALLEST_SUPER), largest))
        rounded = _ROUND[name](given.max(next(bounds)).min(next(bounds)))
        chosen = builder.icmp_signed("==", kind, ir.Constant(I64, number))
        stored = Vec(builder, builder.select(chosen, rounded.value, stored.value))
    return (given > given.const(0.0)).select(stored, given.const(0.0)).lane(0)


@emitted(types.none, _P, _P, _P, _P, _P, types.boolean, *FORM)
def make_grids(
    builder: ir.IRBuilder, lows: ir.Value, highs: ir.Value, scales: ir.Value, zero_points: ir.Value, fits: ir.Value,
    codebook: ir.Value, divisor: ir.Value, top: ir.Value, implied: ir.Value, symmetric: ir.Value, scale_kind: ir.Value,
    under: ir.Value,
) -> None:  # fmt: skip
    """LANES grids from the ranges at `lows` and `highs`; and at `fits` 1 where `_fits` says so, else 0."""
    first = ir.Constant(I64, 0)
    low, high = (Memory(builder, address, F32).load(first) for address in (lows, highs))
    form = Form.of(builder, (divisor, top, implied, symmetric, scale_kind, under))
    scale, zero, inverse = form.grid(low, high)
    fit = _fits(low * inverse, high * inverse, scale, zero, form, codebook)
    for address, value in ((scales, scale), (zero_points, zero), (fits, fit.select(low.const(1.0), low.const(0.0)))):
        Memory(builder, address, F32).store(first, value)


def _fits(lowest: Vec, highest: Vec, scale: Vec, zero: Vec, form: Form, codebook: ir.Value) -> Vec:
    """Whether levels from `lowest` to `highest` need no clamp; nor, on an integer grid, times the scale a rounding."""

    def chosen(table: Vec, integer: Vec) -> Vec:
        return Vec(scale.builder, scale.builder.select(codebook, table.value, integer.value))

    half, near = scale.const(0.5), scale.const(NF4_NEAR)
    inside = (lowest > chosen(scale.const(0.0) - near, scale.const(0.0) - zero - half)) & (
        highest < chosen(near, form.top - zero + half)
    )
    last_bits = scale.cast(I32) & scale.cast(I32).const((1 << LEVEL_BITS) - 1)
    short = last_bits.same(last_bits.const(0)) & (scale > scale.const(2.0**-100)) & (scale < scale.const(2.0**100))
    return inside & chosen(inside, short)


@emitted(types.none, _P, _P, _P, _P)
def store_scale_bits(
    builder: ir.IRBuilder, scales: ir.Value, count: ir.Value, kind: ir.Value, target: ir.Value
) -> None:
    """Write the 16-bit patterns of `count` scales that have been rounded to F16 or BF16."""
    is_half = builder.icmp_signed("==", kind, ir.Constant(I64, SCALE_KINDS["F16"]))

    def convert(scale: Vec) -> Vec:
        half = builder.bitcast(builder.fptrunc(scale.value, ir.VectorType(F16, scale.type.count)), _shorts(scale))
        return Vec(builder, builder.select(is_half, half, (scale.cast(I32) >> 16).narrow(I16).value))

    _map(builder, Memory(builder, scales, F32), count, Memory(builder, target, I16), convert)


@emitted(types.none, _P, _P, _P, types.float32, _P)
def store_scale_bytes(
    builder: ir.IRBuilder, scales: ir.Value, count: ir.Value, kind: ir.Value, under: ir.Value, target: ir.Value
) -> None:
    """Write the codes of `count` scales that have been rounded to E4M3 under `under`, or to E8M0."""
    is_power = builder.icmp_signed("==", kind, ir.Constant(I64, SCALE_KINDS["E8M0"]))

    def convert(scale: Vec) -> Vec:
        power = (scale.cast(I32) >> MANTISSA).narrow(I8)
        code, _ = nearest(scale * Vec(builder, under).splat(scale.type.count), E4M3)
        return Vec(builder, builder.select(is_power, power.value, code.narrow(I8).value))

    _map(builder, Memory(builder, scales, F32), count, Memory(builder, target, I8), convert)


@emitted(types.none, _P, _P, _P)
def store_zero_codes(builder: ir.IRBuilder, zeros: ir.Value, count: ir.Value, target: ir.Value) -> None:
    """Write `count` zero points, a byte each."""
    _map(
        builder, Memory(builder, zeros, F32), count, Memory(builder, target, I8),
        lambda zero: zero.to_int(I32).narrow(I8),
    )  # fmt: skip


def _shorts(value: Vec) -> ir.Type:
    return ir.VectorType(I16, value.type.count)


def _map(builder: ir.IRBuilder, source: Memory, count: ir.Value, target: Memory, convert: Callable[[Vec], Vec]) -> None:
    """Exactly `count` elements converted: whole vectors, then one by one."""
    vectors = builder.and_(count, ir.Constant(I64, -LANES))

    def whole(i: ir.Value, state: State) -> State:
        target.store(i, convert(source.load(i)))
        return state

    def single(i: ir.Value, state: State) -> State:
        at = builder.add(vectors, i)
        target.store(at, convert(source.load(at, 1).splat(1)))
        return state

    loop(builder, vectors, LANES, [], whole)
    loop(builder, builder.sub(count, vectors), 1, [], single)
