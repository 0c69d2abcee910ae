"""A tensor's values in 65,536 bins: what one pass must keep to find one grid for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.engine.tensors import FloatArray

BINS = 1 << 16


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts and sums by the upper 16 bits of a value's float32 pattern; pieces add up.

    A bin is as wide as a bfloat16 step, far narrower than a quantization step, so its mean stands
    for its values. Smallest and largest value are kept exactly.
    """

    counts: npt.NDArray[np.int64]  # (BINS,)
    sums: npt.NDArray[np.float64]  # (BINS,)
    lo: float
    hi: float
    finite: bool = True

    @classmethod
    def of(cls, x: FloatArray) -> Histogram:
        """Of float32 values in any shape, at least one of them."""
        flat = np.ascontiguousarray(x).reshape(-1)
        bins = flat.view(np.uint32) >> np.uint32(16)
        finite = bool(np.isfinite(flat).all())
        counts = np.bincount(bins, minlength=BINS).astype(np.int64)
        sums = np.bincount(bins, flat, BINS).astype(np.float64) if finite else np.zeros(BINS)
        return cls(counts, sums, float(flat.min()), float(flat.max()), finite)

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(
            self.counts + other.counts,
            self.sums + other.sums,
            min(self.lo, other.lo),
            max(self.hi, other.hi),
            self.finite and other.finite,
        )

    def points(self) -> tuple[FloatArray, FloatArray]:
        """Values and how often each counts, (1, n) each; the extremes stand for themselves."""
        counts, sums = self.counts.astype(np.float64), self.sums.copy()
        for extreme in (self.lo, self.hi):
            index = int(np.float32(extreme).view(np.uint32)) >> 16
            if counts[index] >= 1:
                counts[index] -= 1
                sums[index] -= extreme
        used = counts > 0
        values = np.concatenate([[self.lo, self.hi], sums[used] / counts[used]])
        weights = np.concatenate([[1.0, 1.0], counts[used]])
        return values.astype(np.float32)[None], weights.astype(np.float32)[None]
