"""From codes back to numbers: the one way in which backends and readers dequantize."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from service.engine.packing import unpack_rows
from service.engine.schemes.base import Scheme
from service.engine.tensors import Array, CodeArray, FloatArray, QuantizedRows

#: Elements worked on at once: temporaries of this many stay in the processor's cache.
TILE_ELEMENTS = 1 << 16


def dequantize(q: QuantizedRows) -> FloatArray:
    """What packed rows stand for: float32 (rows, cols)."""
    return dequantize_packed(q.packed, q.scheme, q.cols, q.scale, q.zero_point)


def dequantize_packed(
    packed: CodeArray, scheme: Scheme, cols: int, scale: Array, zero_point: CodeArray | None
) -> FloatArray:
    """What packed rows (rows, row_bytes) stand for; scale and zero point as in `QuantizedRows`."""
    out = np.empty((packed.shape[0], cols), np.float32)
    for rows in row_tiles(packed.shape[0], cols):
        _decode(out[rows], unpack_rows(packed[rows], scheme.bits, cols), scheme, *_of_rows(rows, scale, zero_point))
    return out


def dequantize_codes(codes: CodeArray, scheme: Scheme, scale: Array, zero_point: CodeArray | None) -> FloatArray:
    """What codes (rows, cols) stand for; scale and zero point as in `QuantizedRows`."""
    out = np.empty(codes.shape, np.float32)
    for rows in row_tiles(*codes.shape):
        _decode(out[rows], codes[rows], scheme, *_of_rows(rows, scale, zero_point))
    return out


def row_tiles(rows: int, cols: int) -> Iterator[slice]:
    """Slices of rows, each of about TILE_ELEMENTS elements."""
    step = max(1, TILE_ELEMENTS // max(1, cols))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def group_spans(scheme: Scheme, cols: int) -> Iterator[tuple[slice, slice]]:
    """(columns, groups) of the whole groups of a row, then of the short one at its end."""
    size = scheme.group_size if scheme.granularity == "group" and scheme.group_size else cols
    whole = cols // size if size else 0
    if whole:
        yield slice(0, whole * size), slice(0, whole)
    if size and cols % size:
        yield slice(whole * size, cols), slice(whole, whole + 1)


def _of_rows(rows: slice, scale: Array, zero_point: CodeArray | None) -> tuple[Array, CodeArray | None]:
    """The part of scale and zero point for some rows; all of it where it serves the whole tensor."""
    if scale.shape[0] == 1:
        return scale, zero_point
    return scale[rows], None if zero_point is None else zero_point[rows]


def _decode(out: FloatArray, codes: CodeArray, scheme: Scheme, scale: Array, zero_point: CodeArray | None) -> None:
    rows, cols = codes.shape
    s, z = scheme.float_grid(scale, zero_point, cols)
    for columns, groups in group_spans(scheme, cols):
        part = codes[:, columns].reshape(rows, groups.stop - groups.start, -1)  # (rows, groups, g)
        part_scale = np.broadcast_to(s[:, groups], part.shape[:2])
        part_zero = np.broadcast_to(z[:, groups], part.shape[:2])
        out[:, columns] = scheme.decode(np, part, part_scale, part_zero).reshape(rows, -1)
