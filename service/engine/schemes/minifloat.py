"""Floating-point numbers of a few bits: sign, exponent, mantissa, as IEEE 754 has them, subnormals included."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from service.engine.schemes.base import AnyArray
from service.engine.schemes.table import TableScheme
from service.engine.tensors import FloatArray


@dataclass(frozen=True)
class MiniFloat:
    """An element format. A code is sign, exponent and mantissa from the highest bit down, so that codes ascend as
    magnitudes do; those behind `largest` are infinities or no numbers."""

    dtype: np.dtype[np.generic]
    bits: int
    mantissa: int
    smallest_exponent: int  # of a normal number
    largest: float

    @cached_property
    def table(self) -> FloatArray:
        """What each code stands for."""
        return np.arange(1 << self.bits, dtype=np.uint8).view(self.dtype).astype(np.float32)

    @cached_property
    def thresholds(self) -> FloatArray:
        """The code of a magnitude is the number of thresholds below it.

        They are midpoints, and a tie goes to the even code: to the one above where that is even, so that the
        threshold is the next float32 below the midpoint.
        """
        levels = self.table[: int(np.searchsorted(self.table[: len(self.table) // 2], self.largest)) + 1]
        midpoints = (levels[1:] + levels[:-1]) / np.float32(2.0)  # exact: there are bits to spare
        return np.where(np.arange(len(midpoints)) % 2 == 1, np.nextafter(midpoints, np.float32(0.0)), midpoints)


E2M1 = MiniFloat(np.dtype(ml_dtypes.float4_e2m1fn), bits=4, mantissa=1, smallest_exponent=0, largest=6.0)
E4M3 = MiniFloat(np.dtype(ml_dtypes.float8_e4m3fn), bits=8, mantissa=3, smallest_exponent=-6, largest=448.0)
E5M2 = MiniFloat(np.dtype(ml_dtypes.float8_e5m2), bits=8, mantissa=2, smallest_exponent=-14, largest=57344.0)


def round_to(xp: Any, element: MiniFloat, t: AnyArray) -> AnyArray:
    """The codes, uint8, of the nearest numbers; a tie goes to the even code, what is too large to the largest."""
    magnitude = xp.searchsorted(xp.asarray(element.thresholds), xp.abs(t), side="left")
    signs = xp.astype(xp.signbit(t), magnitude.dtype)
    return xp.astype(magnitude + signs * (len(element.table) // 2), xp.uint8)


class MiniFloatScheme(TableScheme):
    """A scheme whose codes are small floating-point numbers."""

    @property
    def element(self) -> MiniFloat:
        """The numbers that it has."""
        return E2M1 if self.bits == 4 else E4M3

    @property
    def table(self) -> FloatArray:
        """Of all codes."""
        return self.element.table

    @property
    def divisor(self) -> np.float32:
        """The largest number that there is: then nothing is cut off."""
        return np.float32(self.element.largest)

    def encode(self, xp: Any, x: AnyArray, scale: AnyArray, zero: AnyArray) -> AnyArray:  # noqa: ARG002
        """The number nearest to x * (1/s)."""
        return round_to(xp, self.element, x * (1.0 / scale)[..., None])
