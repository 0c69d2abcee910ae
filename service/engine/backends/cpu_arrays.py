"""What the kernels read and write, as arrays: weights by address, and what becomes of them."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from service.engine.backends.base import Grid
from service.engine.backends.cpu_form import Form
from service.engine.buffers import Buffers
from service.engine.metrics import ErrorSums
from service.engine.packing import row_bytes
from service.engine.schemes.base import SCALE_DTYPES
from service.engine.tensors import Array, CodeArray, FloatArray, QuantizedRows

#: Sums that a kernel keeps of a tile: x², y², xy, d², largest |d|.
SUMS = 5
#: Elements of F64 input that are converted at once.
CONVERTED_ELEMENTS = 1 << 20

_KINDS: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 1,
    np.dtype(ml_dtypes.bfloat16): 2,
}


class Input:
    """An array as kernels read it: by address and kind. F64 is converted piece by piece."""

    def __init__(self, x: Array) -> None:
        self.array = np.ascontiguousarray(x).reshape(-1)
        self.converts = self.array.dtype not in _KINDS
        self.kind = 0 if self.converts else _KINDS[self.array.dtype]
        self._pieces: dict[int, FloatArray] = {}

    def address(self, first: int, last: int) -> int:
        """Where element 0 is, or would be if elements [first, last) were converted in place."""
        if not self.converts:
            return self.array.ctypes.data
        # A float64 too large for float32 becomes an infinity, which the finite check then reports.
        with np.errstate(over="ignore"):
            piece = self._pieces[first] = self.array[first:last].astype(np.float32)
        return piece.ctypes.data - 4 * first


class Result:
    """What the kernels write."""

    def __init__(self, form: Form, grid: Grid | None, buffers: Buffers) -> None:
        scheme = form.scheme
        self.form, self.grid = form, grid
        self.packed: CodeArray = buffers.empty((form.rows, row_bytes(form.cols, scheme.bits)), np.uint8)
        self.scale = np.empty(form.grids, np.float32)
        self.zero = np.empty(form.grids, np.float32)
        item = SCALE_DTYPES[scheme.scale_dtype].itemsize
        self.scale_bits = np.empty(form.grids if grid is None and item == 2 else 0, np.uint16)
        self.small_scales: CodeArray = np.empty(form.grids if item == 1 else 0, np.uint8)
        self.zero_codes: CodeArray = np.empty(form.grids if grid is None and not scheme.symmetric else 0, np.uint8)
        self.sums = np.empty((-(-form.rows // form.tile_rows), SUMS))
        if grid is not None:
            self.scale[0], self.zero[0] = grid.scale, grid.zero

    def packed_rows(self) -> QuantizedRows:
        """All of it."""
        form = self.form
        scale, zero = self._stored()
        errors = error_sums(form.rows * form.cols, self.sums)
        return QuantizedRows(
            form.scheme, form.cols, self.packed, scale, zero, errors, tensor_scale=form.scheme.tensor_divisor
        )

    def packed_tensors(self) -> list[QuantizedRows]:
        """Of each tensor; a tile is one."""
        form, count = self.form, len(self.sums)
        scale, zero = self._stored()
        scales = scale.reshape(count, -1, form.row_groups)
        zeros = [None] * count if zero is None else zero.reshape(scales.shape)
        packed = self.packed.reshape(count, -1, self.packed.shape[1])
        sums = [_tile_sums(form.rows * form.cols // count, *tile) for tile in self.sums.tolist()]
        each = zip(packed, scales, zeros, sums, strict=True)
        return [QuantizedRows(form.scheme, form.cols, *parts) for parts in each]

    def _stored(self) -> tuple[Array, CodeArray | None]:
        """Scales and zero points."""
        form, scheme = self.form, self.form.scheme
        shape = (1, 1) if self.grid is not None else (form.rows, form.row_groups)
        dtype = SCALE_DTYPES[scheme.scale_dtype]
        bits = self.small_scales if self.small_scales.size else self.scale_bits
        scale = bits.view(dtype) if bits.size else self.scale.astype(dtype, copy=False)
        if scheme.symmetric:
            return scale.reshape(shape), None
        zero = self.zero_codes if self.zero_codes.size else self.zero.astype(np.uint8)
        return scale.reshape(shape), zero.reshape(shape)


def error_sums(count: int, sums: npt.NDArray[np.float64]) -> ErrorSums:
    """Of the sums of tiles, (tiles, SUMS)."""
    xx, yy, xy, dd = sums[:, :-1].sum(axis=0).tolist()
    return _tile_sums(count, xx, yy, xy, dd, float(sums[:, -1].max()))


def _tile_sums(count: int, xx: float, yy: float, xy: float, dd: float, largest: float) -> ErrorSums:
    # A NaN or an infinity anywhere is one in a sum: no square of a finite float32 overflows a float64.
    if not (math.isfinite(xx) and math.isfinite(yy)):
        return ErrorSums(count=count, finite=False)
    return ErrorSums(count, xx, yy, xy, dd, largest)
