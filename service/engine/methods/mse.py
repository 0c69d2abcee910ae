"""The scale and zero point of least squared error, by alternating least squares from many starts.

For each start the range of the group is clipped on either side; then codes and grid are fitted to
each other in turn until the error no longer falls (Lloyd's iteration on a uniform grid, as in
OCTAV, Sakr et al. 2022, and the least squares of ggml's K-quants).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from service.engine.methods.base import Method
from service.engine.schemes.base import AnyArray, Scheme


class Mse(Method):
    """Parameters: the clips tried on either side of the range, and a bound on the iterations."""

    id: ClassVar[str] = "mse"

    clips: tuple[float, ...] = Field(default=(1.0, 0.85, 0.7, 0.55))
    max_iterations: int = Field(default=8, ge=0)

    def find(self, xp: Any, x: AnyArray, scheme: Scheme, weights: AnyArray | None = None) -> tuple[AnyArray, AnyArray]:
        """The best of all starts, the unclipped range among them, so never worse than `minmax`."""
        counted = x if weights is None else xp.where(weights > 0, x, 0.0)
        lo, hi = xp.minimum(xp.min(counted, axis=-1), 0), xp.maximum(xp.max(counted, axis=-1), 0)
        free = scheme.free
        best_scale, best_zero = free.grid(xp, lo, hi)
        best_error = self._error(xp, x, free, best_scale, best_zero, weights)
        for low_clip, high_clip in self.starts(scheme):
            scale, zero = free.grid(xp, lo * low_clip, hi * high_clip)
            scale, zero, error = self._descend(xp, x, free, scale, zero, weights)
            better = error < best_error
            best_scale = xp.where(better, scale, best_scale)
            best_zero = xp.where(better, zero, best_zero)
            best_error = xp.where(better, error, best_error)
        return scheme.settle(xp, x, best_scale, best_zero, weights)

    def starts(self, scheme: Scheme) -> list[tuple[float, float]]:
        """Clips (low, high) to start from: all pairs, or equal ones where the scheme is symmetric."""
        clips = scheme.clips(self.clips)
        if scheme.symmetric:
            return [(clip, clip) for clip in clips]
        return [(low, high) for low in clips for high in clips]

    def _descend(
        self, xp: Any, x: AnyArray, scheme: Scheme, scale: AnyArray, zero: AnyArray, weights: AnyArray | None
    ) -> tuple[AnyArray, AnyArray, AnyArray]:
        error = self._error(xp, x, scheme, scale, zero, weights)
        for _ in range(self.max_iterations):
            codes = scheme.encode(xp, x, scale, zero)
            next_scale, next_zero = scheme.refit(xp, x, codes, scale, zero, weights)
            next_error = self._error(xp, x, scheme, next_scale, next_zero, weights)
            better = next_error < error
            if not xp.any(better):
                break
            scale, zero = xp.where(better, next_scale, scale), xp.where(better, next_zero, zero)
            error = xp.where(better, next_error, error)
        return scale, zero, error

    @staticmethod
    def _error(
        xp: Any, x: AnyArray, scheme: Scheme, scale: AnyArray, zero: AnyArray, weights: AnyArray | None
    ) -> AnyArray:
        d = x - scheme.decode(xp, scheme.encode(xp, x, scale, zero), scale, zero)
        return xp.sum(d * d if weights is None else weights * d * d, axis=-1)
