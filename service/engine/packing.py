"""n-bit packing: one pair of functions for all widths.

Element i of a row lies at bit i*b, little endian, and a row is filled up with zeros to a multiple
of 32 bits. It is the layout of compressed-tensors' pack-quantized format, and, for rows that need
no filling, also a flat little-endian bit stream over the whole tensor.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from service.engine.tensors import CodeArray

WORD_BITS = 32


def row_bytes(cols: int, bits: int) -> int:
    """Bytes of one packed row of `cols` codes."""
    return -(-cols * bits // WORD_BITS) * (WORD_BITS // 8)


def pack_rows(codes: CodeArray, bits: int) -> CodeArray:
    """Pack codes (rows, cols), each below 2**bits, into (rows, row_bytes)."""
    rows, cols = codes.shape
    width = row_bytes(cols, bits)
    if bits == 8:
        return _filled_up(codes, width)
    # Eight codes fill exactly `bits` bytes, so a row is a sequence of such cells.
    cells = -(-cols // 8)
    padded = _filled_up(codes, cells * 8).reshape(rows, cells, 8)
    word = np.zeros((rows, cells), np.uint64)
    for i in range(8):
        word |= padded[:, :, i].astype(np.uint64) << np.uint64(i * bits)
    cell_bytes = word.astype("<u8")[..., None].view(np.uint8)[:, :, :bits].reshape(rows, cells * bits)
    packed = np.zeros((rows, width), np.uint8)
    n = min(width, cells * bits)
    packed[:, :n] = cell_bytes[:, :n]
    return packed


def _filled_up(codes: CodeArray, cols: int) -> CodeArray:
    """A copy with zeros at the ends of its rows."""
    wide = np.zeros((codes.shape[0], cols), np.uint8)
    wide[:, : codes.shape[1]] = codes
    return wide


def unpack_rows(packed: CodeArray, bits: int, cols: int) -> CodeArray:
    """The inverse of `pack_rows`: (rows, row_bytes) back to codes (rows, cols)."""
    rows = packed.shape[0]
    if bits == 8:
        return np.ascontiguousarray(packed[:, :cols])
    if 8 % bits == 0:  # whole codes in every byte, which is quicker
        shifts = range(0, 8, bits)
        parts = np.empty((rows, packed.shape[1], len(shifts)), np.uint8)
        for i, shift in enumerate(shifts):
            parts[:, :, i] = (packed >> shift) & ((1 << bits) - 1)
        return np.ascontiguousarray(parts.reshape(rows, -1)[:, :cols])
    cells = -(-cols // 8)
    n = min(packed.shape[1], cells * bits)
    cell_bytes = np.zeros((rows, cells * bits), np.uint8)
    cell_bytes[:, :n] = packed[:, :n]
    wide = np.zeros((rows, cells, 8), np.uint8)
    wide[:, :, :bits] = cell_bytes.reshape(rows, cells, bits)
    word = wide.view("<u8")[:, :, 0]
    mask = np.uint64((1 << bits) - 1)
    codes = np.empty((rows, cells, 8), np.uint8)
    for i in range(8):
        codes[:, :, i] = ((word >> np.uint64(i * bits)) & mask).astype(np.uint8)
    return np.ascontiguousarray(codes.reshape(rows, cells * 8)[:, :cols])


def pack_columns(codes: CodeArray, bits: int) -> npt.NDArray[np.uint32]:
    """Pack codes (rows, cols) along the columns: (words, cols), what `pack_rows` makes of the transpose, as words."""
    if WORD_BITS % bits:
        return pack_rows(np.ascontiguousarray(codes.T), bits).view("<u4").T
    per_word = WORD_BITS // bits
    short = -len(codes) % per_word
    whole = np.concatenate([codes, np.zeros((short, codes.shape[1]), np.uint8)]) if short else codes
    lanes = whole.reshape(-1, per_word, codes.shape[1])
    words = lanes[:, 0].astype("<u4")
    for i in range(1, per_word):
        words |= lanes[:, i].astype("<u4") << np.uint32(i * bits)
    return words


def pack_flat(codes: CodeArray, bits: int) -> bytes:
    """Pack codes as one little-endian bit stream, filled up to a whole byte."""
    flat = codes.reshape(1, -1)
    return pack_rows(flat, bits).tobytes()[: -(-flat.shape[1] * bits // 8)]


def unpack_flat(data: bytes | memoryview, bits: int, count: int) -> CodeArray:
    """The inverse of `pack_flat`: `count` codes out of a bit stream."""
    packed = np.frombuffer(data, np.uint8)
    width = row_bytes(count, bits)
    row = np.zeros((1, width), np.uint8)
    row[0, : packed.size] = packed
    codes: CodeArray = unpack_rows(row, bits, count)[0]
    return codes
