"""Integers of 2 to 8 bits on a uniform grid: x ≈ (q - z) * s.

Symmetric: s = absmax / (2**(b-1) - 1), z = 2**(b-1). Asymmetric: s = (max - min) / (2**b - 1) over a
range that includes 0, with an integer zero point. Codes are unsigned in both cases.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from service.engine.schemes.base import AnyArray, PlainScaleDtype, Scheme
from service.engine.schemes.regression import regression


class IntegerScheme(Scheme):
    """`int2` … `int8`; parameters: bits, granularity, group_size, is_symmetric, scale_dtype."""

    ids: ClassVar[dict[str, int]] = {f"int{b}": b for b in (2, 3, 4, 5, 6, 8)}

    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    granularity: Literal["tensor", "channel", "group"] = "group"
    scale_dtype: PlainScaleDtype = "F16"
    is_symmetric: bool = Field(default=False)

    @classmethod
    def of(cls, bits: int, *, symmetric: bool, **parameters: Any) -> Self:
        """Any of both symmetries."""
        return cls.model_validate({"bits": bits, "is_symmetric": symmetric, **parameters})

    @property
    def id(self) -> str:
        """`int` and the width."""
        return f"int{self.bits}"

    @property
    def symmetric(self) -> bool:
        """As asked for."""
        return self.is_symmetric

    @property
    def implied_zero(self) -> int:
        """The middle code."""
        return self.middle

    @property
    def top(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code that means 0 in a symmetric scheme."""
        return 1 << (self.bits - 1)

    def grid(self, xp: Any, lo: AnyArray, hi: AnyArray) -> tuple[AnyArray, AnyArray]:
        """See the module's formulas; all of it in float32."""
        if self.is_symmetric:
            scale = self.store_scale(xp, xp.maximum(-lo, hi) / (self.middle - 1))
            return scale, xp.full_like(scale, self.middle)
        scale = self.store_scale(xp, (hi - lo) / self.top)
        return scale, self._zero_point(xp, -lo, scale)

    def encode(self, xp: Any, x: AnyArray, scale: AnyArray, zero: AnyArray) -> AnyArray:
        """clamp(round(x * (1/s)) + z): one reciprocal per group, half to even."""
        inverse = (1.0 / scale)[..., None]
        q = xp.round(x * inverse) + zero[..., None]
        return xp.astype(xp.clip(q, 0, self.top), xp.uint8)

    def decode(self, xp: Any, codes: AnyArray, scale: AnyArray, zero: AnyArray) -> AnyArray:
        """(q - z) * s."""
        return (xp.astype(codes, xp.float32) - zero[..., None]) * scale[..., None]

    def refit(
        self, xp: Any, x: AnyArray, codes: AnyArray, scale: AnyArray, zero: AnyArray, weights: AnyArray | None
    ) -> tuple[AnyArray, AnyArray]:
        """Regression of x on the codes: slope s, intercept -z*s; through the origin when symmetric."""
        if self.is_symmetric:
            w = 1.0 if weights is None else weights
            level = xp.astype(codes, xp.float32) - self.middle
            numerator, denominator = xp.sum(w * x * level, axis=-1), xp.sum(w * level * level, axis=-1)
            return self._slope(xp, numerator, denominator, scale), zero
        q_mean, x_mean, numerator, denominator = regression(xp, x, codes, weights)
        slope = self._slope(xp, numerator, denominator, scale)
        return slope, self._zero_point(xp, q_mean * slope - x_mean, slope)

    def _slope(self, xp: Any, numerator: AnyArray, denominator: AnyArray, fallback: AnyArray) -> AnyArray:
        usable = (denominator > 0) & (numerator > 0)
        slope = xp.where(usable, numerator, fallback) / xp.where(usable, denominator, 1.0)
        return self.store_scale(xp, slope)

    def _zero_point(self, xp: Any, offset: AnyArray, scale: AnyArray) -> AnyArray:
        zero = xp.round(offset * (1.0 / scale))
        # Sums over weights near the end of float32 overflow, and an infinity less an infinity is no number.
        return xp.clip(xp.where(xp.isnan(zero), 0.0, zero), 0, self.top)
