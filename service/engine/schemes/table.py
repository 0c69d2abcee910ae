"""What schemes have in common whose codes index a fixed table of levels: x ≈ table[q] * s, and no zero point."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import numpy as np

from service.engine.schemes.base import AnyArray, Scheme
from service.engine.tensors import FloatArray


class TableScheme(Scheme):
    """A scheme of levels that a scale is multiplied with."""

    @classmethod
    def of(cls, bits: int, *, symmetric: bool, **parameters: Any) -> Self:
        """Symmetric only; raises ValueError otherwise."""
        scheme = cls.model_validate({"bits": bits, **parameters})
        if not symmetric:
            raise ValueError(f"{scheme.id} has no zero point: it is symmetric")
        return scheme

    @property
    @abstractmethod
    def table(self) -> FloatArray:
        """What each code stands for, float32 (2**bits,); a code that no weight gets may be no finite number."""

    @property
    @abstractmethod
    def divisor(self) -> np.float32:
        """The largest magnitude of a group by this is its scale."""

    @property
    def symmetric(self) -> bool:
        """Always: the table holds its zero."""
        return True

    @property
    def implied_zero(self) -> int:
        """None is meant; the table has no offset."""
        return 0

    def grid(self, xp: Any, lo: AnyArray, hi: AnyArray) -> tuple[AnyArray, AnyArray]:
        """The absolute maximum / divisor; there is no zero point."""
        scale = self.store_scale(xp, xp.maximum(-lo, hi) / xp.asarray(self.divisor))
        return scale, xp.zeros_like(scale)

    def decode(self, xp: Any, codes: AnyArray, scale: AnyArray, zero: AnyArray) -> AnyArray:  # noqa: ARG002
        """table[q] * s."""
        return xp.asarray(self.table)[codes] * scale[..., None]

    def refit(
        self, xp: Any, x: AnyArray, codes: AnyArray, scale: AnyArray, zero: AnyArray, weights: AnyArray | None
    ) -> tuple[AnyArray, AnyArray]:
        """The slope of x on the levels, through the origin."""
        w = 1.0 if weights is None else weights
        level = xp.asarray(self.table)[codes]
        numerator, denominator = xp.sum(w * x * level, axis=-1), xp.sum(w * level * level, axis=-1)
        usable = (denominator > 0) & (numerator > 0)
        slope = xp.where(usable, numerator, scale) / xp.where(usable, denominator, 1.0)
        return self.store_scale(xp, slope), zero
