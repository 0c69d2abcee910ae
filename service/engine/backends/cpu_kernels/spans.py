"""Spans: some consecutive elements of a row, brought into the cache as float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import register_jitable

from service.engine.backends.cpu_kernels.vector import F16, F32, I16, I32, I64, LANES, Memory, Vec, emitted, loop

#: Elements of a span; with its codes it fits the first-level cache. A multiple of every group size.
SPAN = 4096

#: Bytes that are fetched before they are needed.
AHEAD = 2048

#: How the input's elements are stored.
KIND_F32, KIND_F16, KIND_BF16 = 0, 1, 2


def _widen(builder: ir.IRBuilder, source: ir.Value, count: ir.Value, target: ir.Value, kind: int) -> None:
    """Convert `count` elements to float32, filled up with zeros to a multiple of LANES."""
    element = F32 if kind == KIND_F32 else I16
    inputs, outputs = Memory(builder, source, element), Memory(builder, target, F32)

    def convert(raw: Vec) -> Vec:
        if kind == KIND_F32:
            return raw
        if kind == KIND_F16:
            return raw.cast(F16).widen(F32)
        return (raw.widen(I32) << 16).cast(F32)

    def whole(i: ir.Value, state: list[Vec]) -> list[Vec]:
        inputs.prefetch(i, AHEAD)
        outputs.store(i, convert(inputs.load(i)))
        return state

    def single(i: ir.Value, state: list[Vec]) -> list[Vec]:
        at = builder.add(vectors, i)
        outputs.store(at, convert(inputs.load(at, 1).splat(1)))
        return state

    vectors = builder.and_(count, ir.Constant(I64, -LANES))
    rest = builder.sub(count, vectors)
    loop(builder, vectors, LANES, [], whole)
    with builder.if_then(builder.icmp_signed(">", rest, ir.Constant(I64, 0))):
        outputs.store(vectors, Vec(builder, ir.Constant(ir.VectorType(F32, LANES), [0.0] * LANES)))
        loop(builder, rest, 1, [], single)


@emitted(types.none, types.intp, types.intp, types.intp)
def copy_f32(builder, source, count, target):
    """`count` float32 at `source`, padded with zeros to whole vectors, to `target`."""
    _widen(builder, source, count, target, KIND_F32)


@emitted(types.none, types.intp, types.intp, types.intp)
def widen_f16(builder, source, count, target):
    """The same from float16."""
    _widen(builder, source, count, target, KIND_F16)


@emitted(types.none, types.intp, types.intp, types.intp)
def widen_bf16(builder, source, count, target):
    """The same from bfloat16."""
    _widen(builder, source, count, target, KIND_BF16)


@njit(nogil=True)
def address_of(array: Any) -> Any:
    """Address of the first element; signed, as Numba adds a signed and an unsigned integer as floats."""
    return np.intp(array.ctypes.data)


@register_jitable
def whole_vectors(count: int) -> int:
    """`count` rounded up to a multiple of LANES; the interpreter may call it as well, and compiles nothing for it."""
    return (count + LANES - 1) // LANES * LANES


@njit(nogil=True)
def item_bytes(kind: int) -> int:
    """Bytes of an element."""
    return 4 if kind == KIND_F32 else 2


@njit(nogil=True)
def as_f32(base: int, kind: int, first: int, count: int, scratch: int) -> int:
    """Address of elements [first, first + count) as float32: their own, or `scratch` with a copy.

    Reading up to the next multiple of LANES gives zeros.
    """
    if kind == KIND_F32:
        if count % LANES == 0:
            return base + 4 * first
        copy_f32(base + 4 * first, count, scratch)
    elif kind == KIND_F16:
        widen_f16(base + 2 * first, count, scratch)
    else:
        widen_bf16(base + 2 * first, count, scratch)
    return scratch
