"""Codes to bits and back, in the layout of `service.engine.packing`.

Eight codes fill `bits` bytes, a cell. In a 64-bit word of eight codes, neighbours are pushed
together in three steps: bytes to pairs, pairs to fours, fours to the cell.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types

from service.engine.backends.cpu_kernels.vector import I8, I16, I64, LANES, Memory, Vec, emitted, loop

_BYTES, _PAIRS, _FOURS = (np.uint64(m) for m in (0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF))
_P = types.intp


@emitted(types.uint64, _P)
def load_word(builder, address):
    """Eight bytes at an address."""
    return Memory(builder, address, I64).load(ir.Constant(I64, 0), 1)


@emitted(types.none, _P, types.uint64)
def store_word(builder, address, word):
    """Write eight bytes."""
    Memory(builder, address, I64).store(ir.Constant(I64, 0), Vec(builder, word))


@emitted(types.uint8, _P)
def load_byte(builder, address):
    """The byte at an address."""
    return Memory(builder, address, I8).load(ir.Constant(I64, 0), 1)


@emitted(types.none, _P, types.uint8)
def store_byte(builder, address, value):
    """Write a byte."""
    Memory(builder, address, I8).store(ir.Constant(I64, 0), Vec(builder, value))


def _pack_vectors(builder: ir.IRBuilder, codes: ir.Value, count: ir.Value, target: ir.Value, bits: int) -> None:
    inputs, outputs = Memory(builder, codes, I8), Memory(builder, target, I8)

    def step(i: ir.Value, state: list[Vec]) -> list[Vec]:
        packed = inputs.load(i)
        width = bits
        while width < 8:
            pairs = packed.cast(I16)
            packed = (pairs | (pairs >> (8 - width))).narrow(I8)
            width *= 2
        outputs.store(builder.udiv(i, ir.Constant(I64, 8 // bits)), packed)
        return state

    loop(builder, count, LANES, [], step)


def _unpack_vectors(builder: ir.IRBuilder, source: ir.Value, count: ir.Value, codes: ir.Value, bits: int) -> None:
    inputs, outputs = Memory(builder, source, I8), Memory(builder, codes, I8)
    per_byte = 8 // bits

    def step(i: ir.Value, state: list[Vec]) -> list[Vec]:
        unpacked = inputs.load(builder.udiv(i, ir.Constant(I64, per_byte)), LANES // per_byte)
        width = 8
        while width > bits:
            width //= 2
            lane = unpacked.widen(I16)
            low = (1 << width) - 1
            lane = (lane & lane.const(low)) | ((lane << (8 - width)) & lane.const(low << 8))
            unpacked = lane.cast(I8)
        outputs.store(i, unpacked)
        return state

    loop(builder, count, LANES, [], step)


@emitted(types.none, _P, _P, _P)
def unpack_4(builder, source, count, codes):
    """The inverse of `pack_4`."""
    _unpack_vectors(builder, source, count, codes, 4)


@emitted(types.none, _P, _P, _P)
def unpack_2(builder, source, count, codes):
    """The inverse of `pack_2`."""
    _unpack_vectors(builder, source, count, codes, 2)


@emitted(types.none, _P, _P, _P)
def unpack_8(builder, source, count, codes):
    """Copy `count` codes (whole vectors)."""
    _unpack_vectors(builder, source, count, codes, 8)


@emitted(types.none, _P, _P, _P)
def pack_8(builder, codes, count, target):
    """Copy `count` codes (whole vectors)."""
    _pack_vectors(builder, codes, count, target, 8)


@emitted(types.none, _P, _P, _P)
def pack_4(builder, codes, count, target):
    """Two codes to a byte."""
    _pack_vectors(builder, codes, count, target, 4)


@emitted(types.none, _P, _P, _P)
def pack_2(builder, codes, count, target):
    """Four codes to a byte."""
    _pack_vectors(builder, codes, count, target, 2)


@njit(nogil=True)
def _cell(word: Any, bits: int) -> Any:
    """The eight codes of a word, pushed together."""
    b = np.uint64(bits)
    word = (word & _BYTES) | (((word >> np.uint64(8)) & _BYTES) << b)
    word = (word & _PAIRS) | (((word >> np.uint64(16)) & _PAIRS) << (b + b))
    return (word & _FOURS) | ((word >> np.uint64(32)) << (np.uint64(4) * b))


@njit(nogil=True)
def _codes(cell: Any, bits: int) -> Any:
    """The inverse of `_cell`; bits above the cell are ignored."""
    b = np.uint64(bits)
    one = np.uint64(1)
    fours, pairs, codes = (one << (np.uint64(4) * b)) - one, (one << (b + b)) - one, (one << b) - one
    word = (cell & fours) | (((cell >> (np.uint64(4) * b)) & fours) << np.uint64(32))
    pairs |= pairs << np.uint64(32)
    word = (word & pairs) | (((word >> (b + b)) & pairs) << np.uint64(16))
    codes |= codes << np.uint64(32)
    codes |= codes << np.uint64(16)
    return (word & codes) | (((word >> b) & codes) << np.uint64(8))


@njit(nogil=True)
def pack_span(codes: int, count: int, bits: int, target: int, nbytes: int) -> None:
    """Pack `count` codes into exactly `nbytes` at `target`; what is left of them becomes zero.

    `codes` must have room for LANES more. Only the last span of a row has a count that is no
    multiple of LANES.
    """
    whole = count - count % LANES
    if bits == 8:
        pack_8(codes, whole, target)
    elif bits == 4:
        pack_4(codes, whole, target)
    elif bits == 2:
        pack_2(codes, whole, target)
    else:
        # A word is wider than its cell; the next store mends what it spills, the last one must not spill.
        inside = (nbytes - 8) // bits + 1 if nbytes >= 8 else 0
        safe = min(whole, 8 * inside)
        for i in range(0, safe, 8):
            store_word(target + i // 8 * bits, _cell(load_word(codes + i), bits))
        whole = safe
    _pack_rest(codes, whole, count, bits, target, nbytes)


@njit(nogil=True)
def _pack_rest(codes: int, start: int, count: int, bits: int, target: int, nbytes: int) -> None:
    """Codes [start, count) byte by byte, and the zeros after them."""
    at = start // 8 * bits
    if at >= nbytes:
        return
    for i in range(count, (count + 7) // 8 * 8):
        store_byte(codes + i, np.uint8(0))
    for i in range(start, count, 8):
        word = _cell(load_word(codes + i), bits)
        for _ in range(min(bits, nbytes - at)):
            store_byte(target + at, np.uint8(word & np.uint64(255)))
            word >>= np.uint64(8)
            at += 1
    for i in range(at, nbytes):
        store_byte(target + i, np.uint8(0))


@njit(nogil=True)
def unpack_span(source: int, nbytes: int, bits: int, count: int, codes: int) -> None:
    """Write `count` codes, and up to seven more, from `nbytes` at `source`."""
    done = count - count % LANES
    if bits == 8:
        unpack_8(source, done, codes)
    elif bits == 4:
        unpack_4(source, done, codes)
    elif bits == 2:
        unpack_2(source, done, codes)
    else:
        inside = (nbytes - 8) // bits + 1 if nbytes >= 8 else 0
        done = min(count // 8, inside) * 8
        for i in range(0, done, 8):
            store_word(codes + i, _codes(load_word(source + i // 8 * bits), bits))
    for i in range(done, count, 8):
        word = np.uint64(0)
        at = i // 8 * bits
        for k in range(min(bits, nbytes - at)):
            word |= np.uint64(load_byte(source + at + k)) << np.uint64(8 * k)
        store_word(codes + i, _codes(word, bits))
