"""From codes back to numbers: the one way in which backends and readers dequantize."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from service.engine.packing import unpack_rows
from service.engine.schemes.base import Scheme
from service.engine.tensors import Array, CodeArray, FloatArray, QuantizedRows


def dequantize(q: QuantizedRows) -> FloatArray:
    """What packed rows stand for: float32 (rows, cols)."""
    return dequantize_codes(unpack_rows(q.packed, q.scheme.bits, q.cols), q.scheme, q.scale, q.zero_point)


def dequantize_codes(codes: CodeArray, scheme: Scheme, scale: Array, zero_point: CodeArray | None) -> FloatArray:
    """What codes (rows, cols) stand for; scale and zero point as in `QuantizedRows`."""
    rows, cols = codes.shape
    s = scale.astype(np.float32)
    z = np.full_like(s, scheme.implied_zero) if zero_point is None else zero_point.astype(np.float32)
    out = np.empty(codes.shape, np.float32)
    for columns, groups in group_spans(scheme, cols):
        part = codes[:, columns].reshape(rows, groups.stop - groups.start, -1)  # (rows, groups, g)
        part_scale = np.broadcast_to(s[:, groups], part.shape[:2])
        part_zero = np.broadcast_to(z[:, groups], part.shape[:2])
        out[:, columns] = scheme.decode(np, part, part_scale, part_zero).reshape(rows, -1)
    return out


def group_spans(scheme: Scheme, cols: int) -> Iterator[tuple[slice, slice]]:
    """(columns, groups) of the whole groups of a row, then of the short one at its end."""
    size = scheme.group_size if scheme.granularity == "group" and scheme.group_size else cols
    whole = cols // size if size else 0
    if whole:
        yield slice(0, whole * size), slice(0, whole)
    if size and cols % size:
        yield slice(whole * size, cols), slice(whole, whole + 1)
