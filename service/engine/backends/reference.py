"""NumPy, written to be read: what every other backend is held to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np

from service.engine.backends.base import Backend, Grid
from service.engine.decode import dequantize, regions
from service.engine.histogram import Histogram
from service.engine.inputs import LayerInputs
from service.engine.methods.base import Method, Solution
from service.engine.methods.minmax import MinMax
from service.engine.metrics import ErrorSums
from service.engine.packing import pack_rows
from service.engine.schemes.base import Scheme
from service.engine.tensors import Array, CodeArray, FloatArray, QuantizedRows

#: Elements worked on at once; keeps the temporaries of a block small.
TILE_ELEMENTS = 1 << 18


class ReferenceBackend(Backend):
    """The specification as code."""

    id: ClassVar[str] = "reference"
    description: ClassVar[str] = "NumPy on one core; slow, and the yardstick for the others"

    def slice_bytes(self, method: Method) -> int:
        """See `Backend.slice_bytes`."""
        return 16 << 20 if isinstance(method, MinMax) else 512 << 10

    def quantize(
        self, x: Array, scheme: Scheme, method: Method, grid: Grid | None = None, inputs: LayerInputs | None = None
    ) -> QuantizedRows:
        """See `Backend.quantize`."""
        # What overflows in a search is worse than what it is compared with, and so is not taken.
        with np.errstate(over="ignore", invalid="ignore"):
            if inputs is not None and scheme.granularity != "tensor":
                return self.measure_output(x, self._solve(x, scheme, method, grid, inputs), inputs)
            tiles = _tiles(x, scheme.row_multiple if scheme.granularity == "block" else 1)
            found = _join([self._quantize_tile(x[tile], scheme, method, grid) for tile in tiles])
        return self.measure_output(x, found, inputs)

    def dequantize(self, q: QuantizedRows) -> FloatArray:
        """See `Backend.dequantize`."""
        return dequantize(q)

    def compare(self, x: Array, y: Array) -> ErrorSums:
        """See `Backend.compare`."""
        return sum((_sums(_as_float32(x[t]), _as_float32(y[t])) for t in _tiles(x)), ErrorSums())

    def observe(self, x: Array) -> Histogram:
        """See `Backend.observe`."""
        tiles = [Histogram.of(_as_float32(x[tile])) for tile in _tiles(x)]
        return sum(tiles[1:], tiles[0])

    def _solve(
        self, raw: Array, scheme: Scheme, method: Method, grid: Grid | None, inputs: LayerInputs
    ) -> QuantizedRows:
        """All rows at once: how many of them suit a method is what `slice_bytes` says."""
        x = _as_float32(raw)
        finite = bool(np.isfinite(x).all())
        own = bound(scheme, grid)
        found = self._solved(x if finite else np.zeros_like(x), own, method, inputs)
        scale, zero = own.stored_grid(found.scale, found.zero, x.shape[1])
        packed = pack_rows(found.codes, scheme.bits)
        q = QuantizedRows(
            scheme, x.shape[1], packed, scale, zero, ErrorSums(count=x.size, finite=False), own.tensor_divisor
        )
        return replace(q, errors=self.compare(x, self.dequantize(q))) if finite else q

    def _solved(self, x: FloatArray, scheme: Scheme, method: Method, inputs: LayerInputs) -> Solution:
        return method.solve(np, x, scheme, inputs)

    def _quantize_tile(self, raw: Array, scheme: Scheme, method: Method, grid: Grid | None) -> QuantizedRows:
        x = _as_float32(raw)
        finite = bool(np.isfinite(x).all())
        if not finite:
            x = np.zeros_like(x)
        rows, cols = x.shape
        codes = np.empty((rows, cols), np.uint8)
        one_grid = grid if scheme.granularity == "tensor" else None
        own = bound(scheme, grid)
        scale = np.empty((rows if one_grid else scheme.scale_rows(rows), scheme.groups(cols)), np.float32)
        zero = np.empty_like(scale)
        decoded = np.empty_like(x)
        for region in regions(scheme, rows, cols):
            part = region.groups_of(np, x)  # (rows, groups, g)
            if one_grid is None:
                s, z = method.find(np, part, own)
            else:
                s, z = np.full(part.shape[:2], one_grid.scale), np.full(part.shape[:2], one_grid.zero)
            q = scheme.encode(np, part, s, z)
            region.put(np, q, codes)
            region.put(np, scheme.decode(np, q, s, z), decoded)
            place = region.scale_rows, region.scale_columns
            scale[place], zero[place] = s, z
        if one_grid is not None:
            scale, zero = scale[:1, :1], zero[:1, :1]
        stored_scale, stored_zero = own.stored_grid(scale, zero, cols)
        return QuantizedRows(
            scheme=scheme,
            cols=cols,
            packed=pack_rows(codes, scheme.bits),
            scale=stored_scale,
            zero_point=stored_zero,
            errors=_sums(x, decoded) if finite else ErrorSums(count=x.size, finite=False),
            tensor_scale=own.tensor_divisor,
        )


def bound(scheme: Scheme, grid: Grid | None) -> Scheme:
    """The scheme for the tensor whose grid it is."""
    return scheme.for_tensor(float(grid.scale)) if grid is not None and scheme.has_tensor_scale else scheme


def _as_float32(x: Array) -> FloatArray:
    # A float64 too large for float32 becomes an infinity, which the finite check then reports.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, dtype=np.float32)


def _tiles(x: Array, multiple: int = 1) -> Iterator[slice]:
    rows = max(1, TILE_ELEMENTS // max(1, x.shape[1]) // multiple) * multiple
    return (slice(start, start + rows) for start in range(0, x.shape[0], rows))


def _sums(x: FloatArray, y: FloatArray) -> ErrorSums:
    a, b = x.astype(np.float64), y.astype(np.float64)
    d = a - b
    return ErrorSums(
        count=a.size,
        sum_xx=float((a * a).sum()),
        sum_yy=float((b * b).sum()),
        sum_xy=float((a * b).sum()),
        sum_dd=float((d * d).sum()),
        max_abs=float(np.abs(d).max(initial=0.0)),
        finite=bool(np.isfinite(a).all() and np.isfinite(b).all()),
    )


def _join(parts: list[QuantizedRows]) -> QuantizedRows:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    per_tensor = first.scheme.granularity == "tensor"
    zeros: list[CodeArray] = [p.zero_point for p in parts if p.zero_point is not None]
    return QuantizedRows(
        scheme=first.scheme,
        cols=first.cols,
        packed=np.concatenate([p.packed for p in parts]),
        scale=first.scale if per_tensor else np.concatenate([p.scale for p in parts]),
        zero_point=(zeros[0] if per_tensor else np.concatenate(zeros)) if zeros else None,
        errors=sum((p.errors for p in parts), ErrorSums()),
        tensor_scale=first.tensor_scale,
    )
