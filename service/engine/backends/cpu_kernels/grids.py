"""Ranges to scales and zero points as stored: sixteen groups at a time, one in each lane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types

from service.engine.backends.cpu_kernels.vector import F32, I32, I64, Memory, Vec, emitted
from service.engine.schemes.base import SCALE_DTYPES, SCALE_LIMITS

#: Scale dtypes as the kernels number them.
SCALE_KINDS = {name: number for number, name in enumerate(SCALE_DTYPES)}
_F16 = SCALE_KINDS["F16"]
_SMALLEST_NORMAL_HALF, _HALF_STEPS = np.float32(2.0**-14), np.float32(2.0**24)

_P = types.intp
#: What the kernels know of a scheme: see `Form`.
FORM = (types.float32, types.float32, types.float32, types.boolean, _P)


@dataclass(frozen=True, slots=True)
class Form:
    """A scheme in the code being emitted.

    A scale is (the range or, if symmetric, the largest magnitude) / divisor; codes end at `top`;
    `implied` is the zero point where none is stored.
    """

    divisor: Vec
    top: Vec
    implied: Vec
    symmetric: ir.Value
    scale_kind: ir.Value

    @classmethod
    def of(cls, builder: ir.IRBuilder, values: tuple[ir.Value, ...]) -> Form:
        """From the arguments that FORM describes."""
        divisor, top, implied = (Vec(builder, v).splat() for v in values[:3])
        return cls(divisor, top, implied, values[3], values[4])

    def grid(self, low: Vec, high: Vec) -> tuple[Vec, Vec, Vec]:
        """`Scheme.grid`, and the reciprocal of its scale."""
        zero = low.const(0.0)
        magnitude = (zero - low).max(high)
        scale = self.store_scale(self.either(magnitude, high - low) / self.divisor)
        inverse = scale.const(1.0) / scale
        return scale, self.zero_point(zero - low, inverse), inverse

    def zero_point(self, offset: Vec, inverse: Vec) -> Vec:
        """clip(rint(offset * (1/s)), 0, top), or the implied one."""
        z = (offset * inverse).rint().max(offset.const(0.0)).min(self.top)
        return self.either(self.implied, z)

    def either(self, symmetric: Vec, asymmetric: Vec) -> Vec:
        """One or the other, as the scheme is."""
        return Vec(symmetric.builder, symmetric.builder.select(self.symmetric, symmetric.value, asymmetric.value))

    def store_scale(self, scale: Vec) -> Vec:
        """`Scheme.store_scale`."""
        stored = scale.const(SCALE_LIMITS["F32"][0])
        for name, kind in SCALE_KINDS.items():
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


@emitted(types.none, _P, _P, _P, _P, *FORM)
def make_grids(
    builder: ir.IRBuilder, lows: ir.Value, highs: ir.Value, scales: ir.Value, zero_points: ir.Value,
    divisor: ir.Value, top: ir.Value, implied: ir.Value, symmetric: ir.Value, scale_kind: ir.Value,
) -> None:  # fmt: skip
    """LANES grids from the ranges at `lows` and `highs`."""
    first = ir.Constant(I64, 0)
    low, high = (Memory(builder, address, F32).load(first) for address in (lows, highs))
    form = Form.of(builder, (divisor, top, implied, symmetric, scale_kind))
    scale, zero, _ = form.grid(low, high)
    Memory(builder, scales, F32).store(first, scale)
    Memory(builder, zero_points, F32).store(first, zero)


@emitted(types.int32, types.float32)
def _pattern(builder: ir.IRBuilder, value: ir.Value) -> Vec:
    """A float32's bits."""
    return Vec(builder, builder.bitcast(value, I32))


@njit(nogil=True, error_model="numpy")
def scale_bits(scale: Any, kind: int) -> Any:
    """The 16-bit pattern of a scale that has been rounded to F16 or BF16."""
    if kind != _F16:
        return _pattern(scale) >> 16
    if scale < _SMALLEST_NORMAL_HALF:
        return int(scale * _HALF_STEPS)
    return (_pattern(scale) >> 13) - (112 << 10)
