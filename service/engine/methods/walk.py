"""GPTQ's walk: column by column, each takes the code next to its weight plus what the errors before it ask for.

With a factor G = Uᵀ D U, U upper triangular with ones on its diagonal, the output error of a row is the sum of squares
of its errors times Uᵀ, by D: so the walk goes from the last column to the first, and makes up in each for all before.
It is the same as eliminating columns from the inverse, which GPTQ does, without an inverse (Babai's nearest plane).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.engine.methods.coded import Coded
from service.engine.schemes.base import AnyArray

#: Columns that are walked through before their errors reach the others, in one matrix product.
BLOCK = 128


@dataclass(frozen=True, slots=True)
class Factor:
    """A damped Gram matrix, factored for the walk.

    order  (cols,) columns of the tensor, the least active first; the walk goes from the last to the first
    upper  (cols, cols) float32: U for columns in this order
    seen   (cols,) what the squared error of each column of the tensor counts, as the walk sees it
    added  what was added to the diagonal
    """

    order: AnyArray
    upper: AnyArray
    seen: AnyArray
    added: float


def damped(xp: Any, gram: AnyArray, damping: float) -> float:
    """What a damping, a share of the mean of the diagonal, adds to it."""
    mean = float(xp.mean(xp.linalg.diagonal(gram)))
    return damping * mean if mean > 0 else 1.0


def factored(xp: Any, gram: AnyArray, added: float) -> Factor:
    """Factor `gram` (cols, cols) with so much added to its diagonal."""
    active = xp.linalg.diagonal(gram)
    order = xp.argsort(active, stable=True)
    ordered = xp.astype(xp.take(xp.take(gram, order, axis=0), order, axis=1), xp.float64)
    upper = xp.linalg.cholesky(ordered + added * xp.eye(gram.shape[0], dtype=xp.float64)).T
    diagonal = xp.linalg.diagonal(upper)
    left = xp.take(diagonal * diagonal, xp.argsort(order))
    seen = xp.sqrt(left * xp.astype(active, xp.float64))
    return Factor(order, xp.astype(upper / diagonal[:, None], xp.float32), xp.astype(seen, xp.float32), added)


def nearest_plane(xp: Any, x: AnyArray, start: Coded, factor: Factor) -> Coded:
    """Walk through rows x (rows, cols) on the grids of `start`; its codes do not matter."""
    return start.with_codes(xp, walk(xp, x, start, factor))


def walk(xp: Any, x: AnyArray, grids: Coded, factor: Factor, at: int = 0) -> AnyArray:
    """Codes for x, the columns of rows from column `at` on, on these grids."""
    order = [int(column) for column in factor.order]
    wanted = xp.take(x, factor.order, axis=1)
    errors, codes = xp.zeros_like(wanted), xp.zeros(x.shape, dtype=xp.uint8)
    for stop in range(len(order), 0, -BLOCK):
        first = max(0, stop - BLOCK)
        wanted[:, first:stop] += errors[:, stop:] @ factor.upper[first:stop, stop:].T
        for j in range(stop - 1, first - 1, -1):
            column = order[j]
            codes[:, column], value = grids.coded(xp, wanted[:, j], at + column)
            errors[:, j] = x[:, column] - value
            wanted[:, first:j] += errors[:, j : j + 1] * factor.upper[first:j, j]
    return codes
