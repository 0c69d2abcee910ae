"""The numbers of a report, from sums that add up over rows, tensors and models."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """What a comparison of x with y adds up to, in float64. Sums of pieces are the sum of the whole.

    `finite` is False as soon as an x is a NaN or an infinity; the other sums then mean nothing.
    """

    count: int = 0
    sum_xx: float = 0.0
    sum_yy: float = 0.0
    sum_xy: float = 0.0
    sum_dd: float = 0.0  # of the squared differences
    max_abs: float = 0.0  # largest absolute difference
    finite: bool = True

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            self.count + other.count,
            self.sum_xx + other.sum_xx,
            self.sum_yy + other.sum_yy,
            self.sum_xy + other.sum_xy,
            self.sum_dd + other.sum_dd,
            max(self.max_abs, other.max_abs),
            self.finite and other.finite,
        )

    @property
    def cosine_similarity(self) -> float:
        """Cosine of the angle between x and y; 1 when both are zero, 0 when only one is."""
        if self.sum_xx == 0.0 or self.sum_yy == 0.0:
            return 1.0 if self.sum_xx == self.sum_yy else 0.0
        return max(-1.0, min(1.0, self.sum_xy / (math.sqrt(self.sum_xx) * math.sqrt(self.sum_yy))))

    @property
    def keeps_magnitude(self) -> bool:
        """Whether y is about as large as x, which the cosine does not see: within a factor of two."""
        return self.sum_xx / 4 <= self.sum_yy <= self.sum_xx * 4

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the difference over that of x; 0 for equal x and y, else inf for x = 0."""
        if self.sum_dd == 0.0:
            return 0.0
        return math.sqrt(self.sum_dd / self.sum_xx) if self.sum_xx else math.inf

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise ratio in dB; None where there is no noise or no signal."""
        if self.sum_dd == 0.0 or self.sum_xx == 0.0:
            return None
        return 10.0 * math.log10(self.sum_xx / self.sum_dd)


@dataclass(frozen=True, slots=True)
class Quality:
    """The figures that a user reads, of a tensor or of a model."""

    cosine_similarity: float
    sqnr_db: float | None
    relative_error: float | None
    max_abs_error: float
    bits_per_weight: float

    @classmethod
    def of(cls, sums: ErrorSums, stored_bytes: int) -> Quality:
        """From the sums, and the bytes in which the weights are stored, everything counted."""
        relative = sums.relative_error
        return cls(
            cosine_similarity=sums.cosine_similarity,
            sqnr_db=sums.sqnr_db,
            relative_error=relative if math.isfinite(relative) else None,
            max_abs_error=sums.max_abs,
            bits_per_weight=8.0 * stored_bytes / sums.count if sums.count else 0.0,
        )
