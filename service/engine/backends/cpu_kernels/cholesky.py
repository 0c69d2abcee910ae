"""The factor U of a damped Gram matrix H = Uᵀ D U, with ones on the diagonal of U, for columns in some order.

By blocks of rows of U, each with all rows above it; so nothing is held but U. Every element is the same sum in the same
order, however columns are shared out.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from service.engine.backends.cpu_kernels.caching import kernel
from service.engine.backends.cpu_kernels.products import PANEL, PANEL_BYTES, add_products
from service.engine.backends.cpu_kernels.spans import address_of

#: Rows of U that are made together.
BLOCK = 128


@njit(nogil=True)
def _left_over(gram, order, added, upper, first, stop, left, j, packed, out):
    """What rows [first, stop) of H have left in columns j and on, PANEL of them, without the rows of U above."""
    cols = order.size
    width, rows = min(PANEL, cols - j), stop - first
    for k in range(first):
        for i in range(width):
            packed[k, i] = upper[k, j + i]
        for i in range(width, PANEL):
            packed[k, i] = np.float32(0.0)
    for r in range(rows):
        row = gram[order[first + r]]
        for i in range(width):
            out[r, i] = -row[order[j + i]]
        for i in range(width, PANEL):
            out[r, i] = np.float32(0.0)
        if j <= first + r < j + width:
            out[r, first + r - j] -= added
    add_products(address_of(left), left.shape[1], address_of(packed), first, address_of(out), rows)
    for r in range(rows):
        for i in range(PANEL):
            out[r, i] = -out[r, i]


@kernel
def factor_block(gram, order, added, upper, pivots, first, stop, left, lower, packed, out):
    """The square of U in rows [first, stop) on the diagonal; and what `factor_columns` wants of it.

    left    (BLOCK, cols): the columns of U above it, by rows, times D
    lower   (BLOCK, BLOCK): minus its lower half as a factor on the left
    pivots  (cols,): D, of which none is smaller than what was added to the diagonal
    """
    rows = stop - first
    for k in range(first):
        for r in range(rows):
            left[r, k] = upper[k, first + r] * pivots[k]
    square = np.zeros((rows, rows))
    for j in range(first, stop, PANEL):
        _left_over(gram, order, added, upper, first, stop, left, j, packed, out)
        for r in range(rows):
            for i in range(min(PANEL, stop - j)):
                square[r, j - first + i] = out[r, i]
    for r in range(rows):
        pivot = max(square[r, r], np.float64(added))
        pivots[first + r] = pivot
        for i in range(r + 1, rows):
            share = square[r, i] / pivot
            upper[first + r, first + i] = share
            lower[i, r] = -share
            for k in range(i, rows):
                square[i, k] -= share * square[r, k]


@kernel
def factor_columns(gram, order, added, upper, pivots, first, stop, left, lower, start, end, packed, out):
    """Columns [start, end) of U in rows [first, stop), right of their square."""
    for j in range(start, end, PANEL):
        _left_over(gram, order, added, upper, first, stop, left, j, packed, out)
        base = address_of(out)
        for r in range(stop - first):
            add_products(address_of(lower[r]), BLOCK, base, r, base + PANEL_BYTES * r, 1)
        for r in range(stop - first):
            for i in range(min(PANEL, end - j)):
                upper[first + r, j + i] = out[r, i] / pivots[first + r]
