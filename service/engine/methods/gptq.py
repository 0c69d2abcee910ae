"""GPTQ (Frantar et al. 2022) from the Gram matrix of a layer's inputs, and a descent on the output error after it.

The output error of a row w that becomes v is (w - v) G (w - v)ᵀ; rows are independent of each other. GPTQ is a greedy
walk through the columns (`walk.py`). What is decided early it does not see again, so a descent (`descent.py`) goes over
all of them a few times more, with the grids in play as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from service.engine.inputs import LayerInputs
from service.engine.methods.base import Method, Solution
from service.engine.methods.coded import Coded
from service.engine.methods.descent import descend
from service.engine.methods.mse import Mse
from service.engine.methods.walk import Factor, damped, factored, nearest_plane
from service.engine.schemes.base import AnyArray, Scheme
from service.engine.tensors import FloatArray

#: Rows of normal weights on which dampings are tried. Of the tensor itself a block of rows knows only its own, and
#: what comes of a row must not depend on the block that it is in.
TRIAL_ROWS = 64


class Gptq(Method):
    """Parameters: the dampings tried, as shares of the mean of the Gram matrix' diagonal, and the sweeps of descent.

    A column that is never fed (its inputs are all 0) gets the codes next to its weights, and no say in anything.
    """

    id: ClassVar[str] = "gptq"
    needs: ClassVar[tuple[str, ...]] = ("gram",)

    dampings: tuple[float, ...] = Field(default=(1e-2, 1e-3, 1e-4), min_length=1)
    sweeps: int = Field(default=6, ge=0)

    def find(self, xp: Any, x: AnyArray, scheme: Scheme, weights: AnyArray | None = None) -> tuple[AnyArray, AnyArray]:
        """The grid of least weighted squared error, as `mse` has it."""
        return Mse().find(xp, x, scheme, weights)

    def solve(self, xp: Any, x: AnyArray, scheme: Scheme, inputs: LayerInputs) -> Solution:
        """Of each row the best by its output error: that of `mse`, or the walk's and the descent's from there."""
        gram = xp.asarray(inputs.gram)
        trial = xp.asarray(trial_rows(inputs.cols))

        def loss(factor: Factor) -> float:
            return float(xp.sum(self._walked(xp, trial, scheme, inputs, factor, 0).output_errors(xp, trial, gram)))

        factor = self.factor(
            inputs, scheme, xp.__name__, lambda damping: factored(xp, gram, damped(xp, gram, damping)), loss
        )
        return self._walked(xp, x, scheme, inputs, factor, self.sweeps).solution

    def _walked(self, xp: Any, x: AnyArray, scheme: Scheme, inputs: LayerInputs, factor: Factor, sweeps: int) -> Coded:
        gram = xp.asarray(inputs.gram)
        plain = start = Coded.of(xp, scheme, super().solve(xp, x, scheme, inputs))
        if scheme.granularity != "block":  # rows of a block have to stay on one grid
            seen = LayerInputs(inputs.cols, mean_square=np.asarray(factor.seen))
            start = Coded.of(xp, scheme, super().solve(xp, x, scheme, seen))
        better = descend(xp, x, gram, nearest_plane(xp, x, start, factor), sweeps, factor.added)
        return plain.unless_better(xp, x, gram, better)

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
