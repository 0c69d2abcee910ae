"""The numbers of a report, from sums that add up over rows, tensors and models."""

from __future__ import annotations

import math

from service.engine.records import record


@record(frozen=True, slots=True)
class ErrorSums:
    """What a comparison of x with y adds up to, in float64. Sums of pieces are the sum of the whole.

    `finite` is False as soon as an x is a NaN or an infinity; the other sums then mean nothing.
    The `out_` sums compare x G xᵀ with y G yᵀ, what the layers of these weights put out over their
    calibration; they are 0 where no Gram matrix G was at hand.
    """

    count: int = 0
    sum_xx: float = 0.0
    sum_yy: float = 0.0
    sum_xy: float = 0.0
    sum_dd: float = 0.0  # of the squared differences
    max_abs: float = 0.0  # largest absolute difference
    finite: bool = True
    out_xx: float = 0.0  # tr(x G xᵀ)
    out_yy: float = 0.0  # tr(y G yᵀ)
    out_xy: float = 0.0  # tr(x G yᵀ)
    out_dd: float = 0.0  # tr((x - y) G (x - y)ᵀ)

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            self.count + other.count,
            self.sum_xx + other.sum_xx,
            self.sum_yy + other.sum_yy,
            self.sum_xy + other.sum_xy,
            self.sum_dd + other.sum_dd,
            max(self.max_abs, other.max_abs),
            self.finite and other.finite,
            self.out_xx + other.out_xx,
            self.out_yy + other.out_yy,
            self.out_xy + other.out_xy,
            self.out_dd + other.out_dd,
        )

    @property
    def cosine_similarity(self) -> float:
        """Cosine of the angle between x and y; 1 when both are zero, 0 when only one is."""
        return _cosine(self.sum_xx, self.sum_yy, self.sum_xy)

    @property
    def accuracy(self) -> float:
        """What is held against `min_accuracy`: the cosine of the outputs where they were compared, else of x and y."""
        return self.output_cosine_similarity if self.has_output else self.cosine_similarity

    @property
    def keeps_magnitude(self) -> bool:
        """Whether y, or its output, is about as large as that of x, which no cosine sees: within a factor of two."""
        xx, yy = (self.out_xx, self.out_yy) if self.has_output else (self.sum_xx, self.sum_yy)
        return xx / 4 <= yy <= xx * 4

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the difference over that of x; 0 for equal x and y, else inf for x = 0."""
        return _relative(self.sum_xx, self.sum_dd)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise ratio in dB; None where there is no noise or no signal."""
        return _sqnr_db(self.sum_xx, self.sum_dd)

    @property
    def has_output(self) -> bool:
        """Whether the outputs were compared: a layer that puts out nothing has none to compare."""
        return self.out_xx > 0.0

    @property
    def output_cosine_similarity(self) -> float:
        """Cosine of the angle between the outputs of x and of y over the calibration."""
        return _cosine(self.out_xx, self.out_yy, self.out_xy)

    @property
    def output_relative_error(self) -> float:
        """Norm of the difference of the outputs over that of the outputs of x."""
        return _relative(self.out_xx, self.out_dd)

    @property
    def output_sqnr_db(self) -> float | None:
        """As `sqnr_db`, of the outputs."""
        return _sqnr_db(self.out_xx, self.out_dd)


@record(frozen=True, slots=True)
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


@record(frozen=True, slots=True)
class OutputQuality:
    """The figures of what layers put out over their calibration, of a tensor or of a model."""

    output_cosine_similarity: float
    output_sqnr_db: float | None
    output_relative_error: float

    @classmethod
    def of(cls, sums: ErrorSums) -> OutputQuality | None:
        """From the sums; None where no outputs were compared."""
        if not sums.has_output:
            return None
        return cls(sums.output_cosine_similarity, sums.output_sqnr_db, sums.output_relative_error)


def _cosine(xx: float, yy: float, xy: float) -> float:
    if xx == 0.0 or yy == 0.0:
        return 1.0 if xx == yy else 0.0
    return max(-1.0, min(1.0, xy / (math.sqrt(xx) * math.sqrt(yy))))


def _relative(xx: float, dd: float) -> float:
    if dd == 0.0:
        return 0.0
    return math.sqrt(dd / xx) if xx else math.inf


def _sqnr_db(xx: float, dd: float) -> float | None:
    return None if dd == 0.0 or xx == 0.0 else 10.0 * math.log10(xx / dd)
