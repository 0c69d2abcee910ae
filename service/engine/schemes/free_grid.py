"""Integers of 2 to 6 bits on a uniform grid with nothing rounded but the codes: x ≈ (q - z) * s."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from service.engine.schemes.base import AnyArray, Scheme
from service.engine.schemes.regression import regression


class FreeGrid(Scheme):
    """Integers on a grid of any scale, 0 included, and of any zero point from the first code to the last."""

    ids: ClassVar[dict[str, int]] = {}

    bits: Literal[2, 3, 4, 5, 6] = 4
    granularity: Literal["group"] = "group"
    scale_dtype: Literal["F32", "F16", "BF16"] = "F32"

    @classmethod
    def of(cls, bits: int, *, symmetric: bool, **parameters: Any) -> Self:
        """Asymmetric only; raises ValueError otherwise."""
        if symmetric:
            raise ValueError("a scheme with nested scales has zero points: it cannot be symmetric")
        return cls.model_validate({"bits": bits, **{k: v for k, v in parameters.items() if v is not None}})

    @property
    def id(self) -> str:
        """Not one to ask for."""
        return f"int{self.bits}_free"

    @property
    def symmetric(self) -> bool:
        """Never."""
        return False

    @property
    def implied_zero(self) -> int:
        """None is; it is stored."""
        return 0

    @property
    def top(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @property
    def half(self) -> float:
        """The zero point in the middle of all codes."""
        return self.top / 2

    def grid(self, xp: Any, lo: AnyArray, hi: AnyArray) -> tuple[AnyArray, AnyArray]:
        """From lo, the first code, to hi, the last."""
        scale = (hi - lo) / self.top
        usable = scale > 0
        zero = xp.where(usable, -lo / xp.where(usable, scale, 1.0), self.half)
        return scale, xp.clip(zero, 0, self.top)

    def encode(self, xp: Any, x: AnyArray, scale: AnyArray, zero: AnyArray) -> AnyArray:
        """clamp(round(x * (1/s) + z)), half to even; with a scale of 0 the code next to z."""
        usable = scale > 0
        inverse = xp.where(usable, 1.0 / xp.where(usable, scale, 1.0), 0.0)[..., None]
        return xp.astype(xp.clip(xp.round(x * inverse + zero[..., None]), 0, self.top), xp.uint8)

    def decode(self, xp: Any, codes: AnyArray, scale: AnyArray, zero: AnyArray) -> AnyArray:
        """(q - z) * s."""
        return (xp.astype(codes, xp.float32) - zero[..., None]) * scale[..., None]

    def refit(
        self, xp: Any, x: AnyArray, codes: AnyArray, scale: AnyArray, zero: AnyArray, weights: AnyArray | None
    ) -> tuple[AnyArray, AnyArray]:
        """Regression of x on the codes: slope s, intercept -z*s."""
        q_mean, x_mean, numerator, denominator = regression(xp, x, codes, weights)
        usable = (denominator > 0) & (numerator > 0)
        slope = xp.where(usable, numerator, scale) / xp.where(usable, denominator, 1.0)
        usable = usable & (slope > 0)
        offset = q_mean - x_mean / xp.where(usable, slope, 1.0)
        return xp.where(usable, slope, scale), xp.where(usable, xp.clip(offset, 0, self.top), zero)
