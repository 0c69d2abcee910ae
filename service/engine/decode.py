"""From codes back to numbers: the one way in which backends and readers dequantize."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from service.engine.packing import unpack_rows
from service.engine.schemes.base import BLOCK, AnyArray, Scheme
from service.engine.tensors import Array, CodeArray, FloatArray, QuantizedRows

#: Elements worked on at once: temporaries of this many stay in the processor's cache.
TILE_ELEMENTS = 1 << 16


def dequantize(q: QuantizedRows) -> FloatArray:
    """What packed rows stand for: float32 (rows, cols)."""
    scale = scales_of_rows(q.scheme, q.scale, 0, q.rows, q.tensor_scale)
    return dequantize_packed(q.packed, q.scheme, q.cols, scale, q.zero_point)


def scales_of_rows(
    scheme: Scheme, stored: Array, first: int, count: int, tensor_scale: np.float32 | None = None
) -> Array:
    """Scales of some rows of a tensor, (count, groups) or (1, 1), from those stored: of blocks, from the first
    row's block on; of others just theirs."""
    if tensor_scale is not None:
        stored = stored.astype(np.float32) / tensor_scale
    if scheme.granularity != "block":
        return stored
    return np.repeat(stored, BLOCK, axis=0)[first % BLOCK : first % BLOCK + count]


def dequantize_packed(
    packed: CodeArray, scheme: Scheme, cols: int, scale: Array, zero_point: CodeArray | None
) -> FloatArray:
    """What packed rows (rows, row_bytes) stand for; scale (from `scales_of_rows`) and zero point of each row."""
    out = np.empty((packed.shape[0], cols), np.float32)
    for rows in row_tiles(packed.shape[0], cols):
        _decode(out[rows], unpack_rows(packed[rows], scheme.bits, cols), scheme, *_of_rows(rows, scale, zero_point))
    return out


def dequantize_codes(codes: CodeArray, scheme: Scheme, scale: Array, zero_point: CodeArray | None) -> FloatArray:
    """What codes (rows, cols) stand for; scale and zero point as in `dequantize_packed`."""
    out = np.empty(codes.shape, np.float32)
    for rows in row_tiles(*codes.shape):
        _decode(out[rows], codes[rows], scheme, *_of_rows(rows, scale, zero_point))
    return out


def row_tiles(rows: int, cols: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of rows, each of about TILE_ELEMENTS elements and all but the last of a multiple of some rows."""
    step = max(1, TILE_ELEMENTS // max(1, cols) // multiple) * multiple
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def group_spans(scheme: Scheme, cols: int) -> Iterator[tuple[slice, slice]]:
    """(columns, groups) of the whole groups of a row, then of the short one at its end."""
    size = scheme.width or cols
    whole = cols // size if size else 0
    if whole:
        yield slice(0, whole * size), slice(0, whole)
    if size and cols % size:
        yield slice(whole * size, cols), slice(whole, whole + 1)


@dataclass(frozen=True, slots=True)
class Region:
    """Some rows and columns of a matrix that are groups of one size, and where the scales of these are."""

    rows: slice
    columns: slice
    scale_rows: slice
    scale_columns: slice

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        """Groups and their elements, in the order of the matrix."""
        rows, columns, down, across = (
            s.stop - s.start for s in (self.rows, self.columns, self.scale_rows, self.scale_columns)
        )
        return down, rows // down, across, columns // across

    def groups_of(self, xp: Any, x: AnyArray) -> AnyArray:
        """The elements of its groups, (scale rows, scale columns, g)."""
        down, high, across, wide = self._shape
        part = xp.reshape(x[self.rows, self.columns], (down, high, across, wide))
        return xp.reshape(xp.moveaxis(part, 2, 1), (down, across, high * wide))

    def put(self, xp: Any, groups: AnyArray, target: AnyArray) -> None:
        """Write what `groups_of` gives, or codes of it, to where it belongs in a matrix."""
        down, high, across, wide = self._shape
        part = xp.moveaxis(xp.reshape(groups, (down, across, high, wide)), 2, 1)
        target[self.rows, self.columns] = xp.reshape(part, (down * high, across * wide))


def regions(scheme: Scheme, rows: int, cols: int) -> Iterator[Region]:
    """All of a matrix of whole rows of groups, which may be short at the end."""
    if scheme.granularity == "block":
        whole = rows // BLOCK
        bands = [(slice(0, whole * BLOCK), slice(0, whole))] if whole else []
        bands += [(slice(whole * BLOCK, rows), slice(whole, whole + 1))] if rows % BLOCK else []
    else:
        bands = [(slice(0, rows), slice(0, rows))]
    for (band, down), (columns, across) in product(bands, list(group_spans(scheme, cols))):
        yield Region(band, columns, down, across)


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
