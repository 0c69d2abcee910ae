"""Numbers of 8 bits with scales for a tensor, its rows, or its blocks: what FP8 units multiply.

E4M3 is the one for weights; E5M2 has a wider range and a bit less of mantissa (Micikevicius et al. 2022).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from service.engine.schemes.base import PlainScaleDtype, ScaleDtype
from service.engine.schemes.minifloat import E4M3, E5M2, MiniFloat, MiniFloatScheme


class _Float8(MiniFloatScheme):
    """What both have in common; there are few scales, so that nothing is gained by small ones."""

    bits: Literal[8] = 8
    granularity: Literal["tensor", "channel", "block"] = "channel"
    group_size: None = None
    scale_dtype: PlainScaleDtype = "F32"

    @classmethod
    def usual_scale(cls, dtype: str) -> ScaleDtype:
        """The model's own dtype, and no smaller one than it."""
        return "BF16" if dtype == "BF16" else "F32"


class Float8E4M3(_Float8):
    """`fp8_e4m3`: 8 bits, 3 of them mantissa; parameters: granularity (tensor, channel, block), scale_dtype."""

    ids: ClassVar[dict[str, int]] = {"fp8_e4m3": 8}

    @property
    def id(self) -> str:
        """Its name."""
        return "fp8_e4m3"

    @property
    def element(self) -> MiniFloat:
        """Ends at 448, has no infinity."""
        return E4M3


class Float8E5M2(_Float8):
    """`fp8_e5m2`: 8 bits, 2 of them mantissa; parameters: granularity (tensor, channel, block), scale_dtype."""

    ids: ClassVar[dict[str, int]] = {"fp8_e5m2": 8}

    @property
    def id(self) -> str:
        """Its name."""
        return "fp8_e5m2"

    @property
    def element(self) -> MiniFloat:
        """Ends at 57,344."""
        return E5M2
