"""The error of a layer's output over its calibration: exact, and from the Gram matrix alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from service.engine.metrics import ErrorSums
from service.engine.tensors import Array, FloatArray

#: Elements of the rows worked on at once: many rows, for each tile goes through the whole matrix.
TILE_ELEMENTS = 1 << 20


def with_output(sums: ErrorSums, x: Array, y: Array, gram: FloatArray) -> ErrorSums:
    """`sums` with the output error of y (rows, cols) against x under `gram` (cols, cols).

    Sums of matrix products in float32 add up in float64. What is multiplied is the difference, and the rest follows
    from it: nothing cancels, however small the error.
    """
    step = max(1, TILE_ELEMENTS // x.shape[1])
    xx = xd = dd = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, x.shape[0], step):
            rows = slice(start, start + step)
            a = np.ascontiguousarray(x[rows], np.float32)
            d = a - np.asarray(y[rows], np.float32)
            fed = a @ gram
            xx += _dot(fed, a)
            xd += _dot(fed, d)
            dd += _dot(np.matmul(d, gram, out=fed), d)
    if not np.isfinite((xx, xd, dd)).all():
        return sums  # weights near the end of float32
    # Of a matrix that is symmetric and positive but for rounding.
    xx, dd = max(0.0, xx), max(0.0, dd)
    return replace(sums, out_xx=xx, out_yy=max(0.0, xx - 2 * xd + dd), out_xy=xx - xd, out_dd=dd)


def _dot(a: FloatArray, b: FloatArray) -> float:
    return float(np.einsum("ij,ij->i", a, b, dtype=np.float64).sum())
