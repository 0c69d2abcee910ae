"""The bytes of the tensors that stand for quantized ones, of many small ones together."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain, groupby

import numpy as np

from service.engine.formats.compressed_tensors_config import Packing
from service.engine.packing import WORD_BITS, pack_columns, unpack_rows
from service.engine.tensors import Array, CodeArray, QuantizedRows


def stored_parts(tensors: Sequence[QuantizedRows], packing: Packing) -> list[memoryview]:
    """Of each tensor the parts that `parts_of` names, in its order; no scheme may take a pass."""
    found: list[memoryview] = []
    for _, alike in groupby(tensors, lambda rows: (rows.packed.shape, rows.scale.shape)):
        found += _parts_alike(list(alike), packing)
    return found


def stored_codes(rows: QuantizedRows, packing: Packing) -> Array:
    """The codes of some rows as the tensor that holds them has them, (rows, ...)."""
    if packing == "pack-quantized":
        return rows.packed
    if packing == "int-quantized":
        return signed(unpack_rows(rows.packed, rows.scheme.bits, rows.cols), rows.scheme.bits)
    return rows.packed[:, : rows.cols * rows.scheme.bits // 8]


def signed(codes: CodeArray, bits: int) -> Array:
    """Codes as they stand around zero, a byte each."""
    return (codes - np.uint8(1 << (bits - 1))).view(np.int8)  # modulo 256


def _parts_alike(tensors: list[QuantizedRows], packing: Packing) -> list[memoryview]:
    """Of tensors of one shape."""
    first = tensors[0]
    is_packed, bits = packing == "pack-quantized", first.scheme.bits
    parts: list[Sequence[memoryview]] = [
        [_bytes(stored_codes(rows, packing)) for rows in tensors],
        [_bytes(rows.scale) for rows in tensors],
    ]
    if is_packed:
        parts.append([memoryview(struct.pack("<qq", first.rows, first.cols))] * len(tensors))
    zeros = [rows.zero_point for rows in tensors if rows.zero_point is not None]
    if zeros:
        parts.append(_packed_zeros(zeros, bits) if is_packed else [_bytes(signed(zero, bits)) for zero in zeros])
    return list(chain.from_iterable(zip(*parts, strict=True)))


def _packed_zeros(zeros: Sequence[CodeArray], bits: int) -> list[memoryview]:
    """Packed along the rows: at once where those of each tensor fill whole words."""
    if WORD_BITS % bits or len(zeros[0]) * bits % WORD_BITS:
        return [_bytes(pack_columns(zero, bits)) for zero in zeros]
    return [_bytes(words) for words in pack_columns(np.concatenate(zeros), bits).reshape(len(zeros), -1)]


def _bytes(array: Array) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).data
