"""GPTQ (Frantar et al. 2022) from the Gram matrix of a layer's inputs, and a descent on the output error after it.

The output error of a row w that becomes v is (w - v) G (w - v)ᵀ; rows are independent of each other. With a factor
G = Uᵀ U, U upper triangular, GPTQ is a greedy walk: column by column, the most active first, each takes the code next
to its weight plus what the errors of the columns before it ask for. This is `nearest_plane`. What is decided early the
walk does not see again, so `descend` goes over all columns a few times more, with the grids in play as well; and a
second walk on these grids ends elsewhere, often better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from service.engine.inputs import LayerInputs
from service.engine.methods.base import Method, Solution
from service.engine.methods.descent import Coded, descend
from service.engine.methods.mse import Mse
from service.engine.schemes.base import AnyArray, Scheme
from service.engine.tensors import FloatArray

#: Columns that are walked through before their errors reach the others, in one matrix product.
BLOCK = 128
#: Rows of normal weights on which dampings are tried. Of the tensor itself a block of rows knows only its own, and
#: what comes of a row must not depend on the block that it is in.
TRIAL_ROWS = 64


@dataclass(frozen=True, slots=True)
class Factor:
    """A damped Gram matrix, factored for the walk.

    order  (cols,) columns of the tensor, the least active first; the walk goes from the last to the first
    upper  (cols, cols) float32: U with rows divided by its diagonal, for columns in this order
    seen   (cols,) what an error of each column of the tensor adds when the rest of the walk makes up for it
    """

    order: AnyArray
    upper: AnyArray
    seen: AnyArray


class Gptq(Method):
    """Parameters: the dampings tried, as shares of the Gram matrix' mean diagonal, rounds, and sweeps in each.

    A round is a walk and the sweeps of descent after it; the next walks on the grids that it has found.
    A column that is never fed (its inputs are all 0) gets the codes next to its weights, and no say in anything.
    """

    id: ClassVar[str] = "gptq"
    needs: ClassVar[tuple[str, ...]] = ("gram",)

    dampings: tuple[float, ...] = Field(default=(1e-2, 1e-3, 1e-4), min_length=1)
    rounds: int = Field(default=2, ge=1)
    sweeps: int = Field(default=3, ge=0)

    def find(self, xp: Any, x: AnyArray, scheme: Scheme, weights: AnyArray | None = None) -> tuple[AnyArray, AnyArray]:
        """The grid of least weighted squared error, as `mse` has it."""
        return Mse().find(xp, x, scheme, weights)

    def solve(self, xp: Any, x: AnyArray, scheme: Scheme, inputs: LayerInputs) -> Solution:
        """Of each row the best by its output error: that of `mse`, or the walk's and the descent's from there."""
        gram = xp.asarray(inputs.gram)
        trial = xp.asarray(trial_rows(inputs.cols))
        begun = Coded.of(xp, scheme, super().solve(xp, trial, scheme, LayerInputs(inputs.cols)))

        def loss(factor: Factor) -> float:
            return float(xp.sum(nearest_plane(xp, trial, begun, factor).output_errors(xp, trial, gram)))

        factor = self.factor(inputs, scheme, xp.__name__, lambda damping: factored(xp, gram, damping), loss)
        plain = start = Coded.of(xp, scheme, super().solve(xp, x, scheme, inputs))
        if scheme.granularity != "block":  # rows of a block have to stay on one grid
            seen = LayerInputs(inputs.cols, mean_square=np.asarray(factor.seen))
            start = Coded.of(xp, scheme, super().solve(xp, x, scheme, seen))
        best = plain
        for _ in range(self.rounds):
            start = descend(xp, x, gram, nearest_plane(xp, x, start, factor), self.sweeps)
            best = best.unless_better(xp, x, gram, start)
        return best.solution

    def held_bytes(self, cols: int) -> int:
        """Two factors, while one is tried and the best is kept; later one."""
        return 8 * cols * cols

    def factor(
        self,
        inputs: LayerInputs,
        scheme: Scheme,
        library: str,
        make: Callable[[float], Factor],
        loss: Callable[[Factor], float],
    ) -> Factor:
        """The factor that `make` gives for the damping of least `loss`, which is found once for each scheme.

        Schemes that agree on a damping share its factor, as far as the same `library` makes it.
        """

        def tried() -> float:
            best, least, kept = self.dampings[0], float("inf"), None
            for damping in self.dampings:
                factor = make(damping)
                error = loss(factor)
                if kept is None or error < least:
                    best, least, kept = damping, error, factor
            inputs.once(("gptq", library, best), lambda: kept)
            return best

        damping = inputs.once(("gptq", library, self.dampings, scheme), tried)
        return inputs.once(("gptq", library, damping), lambda: make(damping))


def trial_rows(cols: int) -> FloatArray:
    """Those on which dampings are tried."""
    return np.random.default_rng(0).standard_normal((TRIAL_ROWS, cols), np.float32)


def added_for(mean: float, damping: float) -> float:
    """What a damping adds to the diagonal of a Gram matrix, which has this mean."""
    return damping * mean if mean > 0 else 1.0


def factored(xp: Any, gram: AnyArray, damping: float) -> Factor:
    """Factor `gram` (cols, cols) with the share `damping` of its diagonal's mean added to the diagonal."""
    active = xp.linalg.diagonal(gram)
    order = xp.argsort(active, stable=True)
    added = added_for(float(xp.mean(active)), damping)
    ordered = xp.astype(xp.take(xp.take(gram, order, axis=0), order, axis=1), xp.float64)
    upper = xp.linalg.cholesky(ordered + added * xp.eye(gram.shape[0], dtype=xp.float64)).T
    diagonal = xp.linalg.diagonal(upper)
    left = xp.take(diagonal * diagonal, xp.argsort(order))
    seen = xp.sqrt(left * xp.astype(active, xp.float64))
    return Factor(order, xp.astype(upper / diagonal[:, None], xp.float32), xp.astype(seen, xp.float32))


def nearest_plane(xp: Any, x: AnyArray, start: Coded, factor: Factor) -> Coded:
    """Walk through rows x (rows, cols) on the grids of `start`; its codes do not matter."""
    order = [int(column) for column in factor.order]
    wanted = xp.take(x, factor.order, axis=1)
    errors, codes = xp.zeros_like(wanted), xp.zeros_like(start.codes)
    for stop in range(len(order), 0, -BLOCK):
        first = max(0, stop - BLOCK)
        wanted[:, first:stop] += errors[:, stop:] @ factor.upper[first:stop, stop:].T
        for j in range(stop - 1, first - 1, -1):
            column = order[j]
            codes[:, column], value = start.coded(xp, wanted[:, j], column)
            errors[:, j] = x[:, column] - value
            wanted[:, first:j] += errors[:, j : j + 1] * factor.upper[first:j, j]
    return start.with_codes(xp, codes)
