"""Small numbers in small groups: `fp4` with ordinary scales, and the two families of formats with scales of 8 bits.

MX (OCP Microscaling Formats 1.0) has groups of 32 under powers of two, NVFP4 groups of 16 under E4M3 scales, which
are themselves under one scale of the tensor.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from service.engine.schemes.base import SCALE_LIMITS, AnyArray, GroupSize, PlainScaleDtype, ScaleDtype, Scheme
from service.engine.schemes.minifloat import E4M3, MiniFloatScheme, round_to
from service.engine.tensors import Array, CodeArray, FloatArray

#: All scales of MX, and where the one above begins: a scale is the nearest of them, the upper one in the middle.
POWERS = np.exp2(np.arange(-126, 128, dtype=np.float64)).astype(np.float32)
MX_MIDPOINTS = np.float32(1.5) * POWERS[:-1]
#: A tensor scale within these has scales of groups under it whose reciprocals are finite.
TENSOR_SCALES = (2.0**-116, 2.0**100)


class Fp4(MiniFloatScheme):
    """`fp4`: E2M1 under ordinary scales; parameters: granularity, group_size, scale_dtype."""

    ids: ClassVar[dict[str, int]] = {"fp4": 4}

    bits: Literal[4] = 4
    granularity: Literal["tensor", "channel", "group"] = "group"
    group_size: GroupSize | None = 64
    scale_dtype: PlainScaleDtype = "F16"

    @property
    def id(self) -> str:
        """Its name."""
        return "fp4"

    def clips(self, usual: tuple[float, ...]) -> tuple[float, ...]:
        """Numbers lie closest about 0 and 4, so a larger scale than that of the range may be the better one."""
        return _FP4_CLIPS if usual else usual


class Mx(MiniFloatScheme):
    """`mxfp4` and `mxfp8` (E4M3): groups of 32 under a power of two. No parameters."""

    ids: ClassVar[dict[str, int]] = {"mxfp4": 4, "mxfp8": 8}

    bits: Literal[4, 8] = 4
    granularity: Literal["group"] = "group"
    group_size: Literal[32] = 32
    scale_dtype: Literal["E8M0"] = "E8M0"

    @classmethod
    def usual_scale(cls, dtype: str) -> ScaleDtype:
        """The only one."""
        del dtype
        return "E8M0"

    @property
    def id(self) -> str:
        """`mxfp` and the width."""
        return f"mxfp{self.bits}"

    @property
    def divisor(self) -> np.float32:
        """With it the scale is the least that takes the largest magnitude below 7 (4 bits) or 448 (8 bits).

        So does the library compressed-tensors: what lies between 6 and 7 goes to 6 in any case.
        """
        return np.float32(7 / 6 * 2.0 ** (2 if self.bits == 4 else 8))

    def store_scale(self, xp: Any, scale: AnyArray) -> AnyArray:
        """The nearest power of two; 1 for 0."""
        index = xp.searchsorted(xp.asarray(MX_MIDPOINTS), scale, side="right")
        return xp.where(scale == 0, 1.0, xp.asarray(POWERS)[index])

    def clips(self, usual: tuple[float, ...]) -> tuple[float, ...]:
        """The exponents next to that of the range."""
        return (1.0, 0.5, 2.0) if usual else usual


class NvFp4(MiniFloatScheme):
    """`nvfp4`: groups of 16 under E4M3 scales, and these under one F32 scale of the tensor. No parameters.

    What is stored for a group is its scale times that of the tensor.
    """

    ids: ClassVar[dict[str, int]] = {"nvfp4": 4}

    bits: Literal[4] = 4
    granularity: Literal["group"] = "group"
    group_size: Literal[16] = 16
    scale_dtype: Literal["E4M3"] = "E4M3"
    # Found for each tensor, never asked for.
    tensor_scale: SkipJsonSchema[float] = Field(default=1.0, exclude=True)

    @classmethod
    def usual_scale(cls, dtype: str) -> ScaleDtype:
        """The only one."""
        del dtype
        return "E4M3"

    @property
    def id(self) -> str:
        """Its name."""
        return "nvfp4"

    @property
    def has_tensor_scale(self) -> bool:
        """See `Scheme.has_tensor_scale`."""
        return True

    def tensor_scale_for(self, largest: float) -> float:
        """Such that the largest scale of a group is stored as the largest number of E4M3."""
        if largest == 0.0:
            return 1.0
        smallest, most = TENSOR_SCALES
        scale = self.element.largest * SCALE_LIMITS["E4M3"][1] / largest
        return float(np.float32(min(max(scale, smallest), most)))

    @property
    def tensor_divisor(self) -> np.float32:
        """See `Scheme.tensor_divisor`."""
        return np.float32(self.tensor_scale)

    def stored_grid(self, scale: FloatArray, zero: FloatArray, cols: int) -> tuple[Array, CodeArray | None]:
        """See `Scheme.stored_grid`."""
        return super().stored_grid(scale * self.tensor_divisor, zero, cols)

    def for_tensor(self, tensor_scale: float) -> Scheme:
        """See `Scheme.for_tensor`."""
        return self.model_copy(update={"tensor_scale": float(tensor_scale)})

    def store_scale(self, xp: Any, scale: AnyArray) -> AnyArray:
        """The nearest E4M3 of scale * tensor_scale, divided by that again; for 0 what is stored is 1."""
        smallest, largest = SCALE_LIMITS["E4M3"]
        under = xp.asarray(self.tensor_divisor)
        scaled = xp.minimum(xp.maximum(xp.where(scale == 0, 1.0, scale * under), smallest), largest)
        return xp.asarray(E4M3.table)[round_to(xp, E4M3, scaled)] / under

    def clips(self, usual: tuple[float, ...]) -> tuple[float, ...]:
        """See `Fp4.clips`."""
        return _FP4_CLIPS if usual else usual


_FP4_CLIPS = (1.0, 1.5, 1.25, 0.85, 0.7)
