"""Half-quadratic shrinkage of the errors, as in HQQ (Badri & Shaji 2023): outliers pull less on the grid.

The Lp norm, p < 1, of the errors is split: those that stand out are shrunk and set aside, and the grid is fitted to the
rest by least squares; in turn, with the codes anew each time. Errors count in steps of the grid, so that what stands
out does not depend on the unit of the weights.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from service.engine.methods.base import Method
from service.engine.methods.minmax import MinMax
from service.engine.schemes.base import AnyArray, Scheme


class Hqq(Method):
    """Parameters: the p of the norm, the strength of the split, its growth by iteration, and how many there are.

    As published, the scale stays that of the range, and a zero point that is any number moves. Here it is a whole one,
    which rounding would hold where it is: so the scale moves with it, and alone where a scheme has no zero point.
    """

    id: ClassVar[str] = "hqq"

    norm: float = Field(default=0.7, gt=0, lt=1)
    beta: float = Field(default=10.0, gt=0)
    growth: float = Field(default=1.01, ge=1)
    max_iterations: int = Field(default=20, ge=0)

    def find(self, xp: Any, x: AnyArray, scheme: Scheme, weights: AnyArray | None = None) -> tuple[AnyArray, AnyArray]:
        """The grid of the least Lp norm on the way, of those whose squared error is no larger than `minmax` has."""
        free = scheme.free
        scale, zero = MinMax().find(xp, x, free, weights)
        best_scale, best_zero = scale, zero
        best, limit = self._norms(xp, x, free, scale, zero, weights)
        beta = self.beta
        for _ in range(self.max_iterations):
            codes = free.encode(xp, x, scale, zero)
            rest = x - self._outliers(xp, x - free.decode(xp, codes, scale, zero), scale, beta)
            scale, zero = free.refit(xp, rest, codes, scale, zero, weights)
            norm, square = self._norms(xp, x, free, scale, zero, weights)
            better = (norm < best) & (square <= limit)
            best_scale, best_zero = xp.where(better, scale, best_scale), xp.where(better, zero, best_zero)
            best = xp.where(better, norm, best)
            beta *= self.growth
        return scheme.settle(xp, x, best_scale, best_zero, weights)

    def _outliers(self, xp: Any, error: AnyArray, scale: AnyArray, beta: float) -> AnyArray:
        """What of the errors stands out: the generalised soft threshold of the Lp norm."""
        steps = xp.abs(error) / scale[..., None]
        # Where there is no error the power would be infinite.
        threshold = xp.where(steps > 0, steps, 1.0) ** (self.norm - 1.0) / beta
        return xp.sign(error) * xp.maximum(steps - threshold, 0.0) * scale[..., None]

    def _norms(
        self, xp: Any, x: AnyArray, scheme: Scheme, scale: AnyArray, zero: AnyArray, weights: AnyArray | None
    ) -> tuple[AnyArray, AnyArray]:
        """The p-th power of the Lp norm of the errors of each group, and the sum of their squares."""
        error = xp.abs(x - scheme.decode(xp, scheme.encode(xp, x, scale, zero), scale, zero))
        w = 1.0 if weights is None else weights
        return xp.sum(w * error**self.norm, axis=-1), xp.sum(w * error * error, axis=-1)
