"""What a scheme is: a number format, its granularity, and the arithmetic that defines both.

A scheme sees groups: arrays (..., g) of float32 in which the last axis shares one scale. The
arithmetic is written in the array API standard, so NumPy and CuPy run the same lines; kernels of a
backend are held to it. Only scales of two bytes ask for a dtype that the standard does not have.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cache
from typing import Any, ClassVar, Literal, Self, get_args

import ml_dtypes
import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypeAliasType

from service.engine.packing import row_bytes
from service.engine.tensors import Array, CodeArray, FloatArray

# Named types, so that they have their names in the OpenAPI document as well.
Granularity = TypeAliasType("Granularity", Literal["tensor", "channel", "group", "block"])
GroupSize = TypeAliasType("GroupSize", Literal[16, 32, 64, 128, 256])
#: Dtypes of scales to choose from, where a scheme leaves the choice; and all that there are.
PlainScaleDtype = Literal["F32", "F16", "BF16"]
ScaleDtype = Literal["F32", "F16", "BF16", "E4M3", "E8M0"]

#: A tensor scale is stored as F32.
TENSOR_SCALE_BYTES = 4
#: Rows and columns of a block, in which one scale serves both ways.
BLOCK = 128
#: Row blocks are multiples of this, so that they end on whole words in every packing.
ROW_MULTIPLE = 32

SCALE_DTYPES: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
# Smallest stored scale: its reciprocal must be finite in float32. Largest: what the dtype can hold.
SCALE_LIMITS: dict[str, tuple[float, float]] = {
    "F32": (2.0**-126, float(np.finfo(np.float32).max)),
    "F16": (2.0**-24, 65504.0),
    "BF16": (2.0**-126, (2 - 2.0**-7) * 2.0**127),
    "E4M3": (2.0**-9, 448.0),
    "E8M0": (2.0**-126, 2.0**127),
}
#: Smallest scale that a dtype stores with all its digits, and what none reaches without being cut off.
SCALE_RANGES: dict[str, tuple[float, float]] = {
    "F32": (0.0, math.inf),
    "F16": (2.0**-14, 65504.0),
    "BF16": (0.0, math.inf),
    # What is stored in these has no wider scales to go to.
    "E4M3": (0.0, math.inf),
    "E8M0": (0.0, math.inf),
}
#: Loaders multiply in the model's own dtype, so its scales are stored in that, or in F16 where it is wider.
USUAL_SCALE: dict[str, ScaleDtype] = {"F64": "F16", "F32": "F16", "F16": "F16", "BF16": "BF16"}

#: An array of any array-API library.
AnyArray = Any


class Scheme(BaseModel):
    """Base of all schemes. Frozen, hashable, and equal when their parameters are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: The ids under which this class can be asked for, each with the bits per code it stands for.
    ids: ClassVar[dict[str, int]]

    bits: int = Field(ge=2, le=8)
    granularity: Granularity = "group"
    group_size: GroupSize | None = 128
    scale_dtype: ScaleDtype = "F16"

    @classmethod
    @cache  # asked for every tensor
    def choices(cls, parameter: str) -> tuple[Any, ...]:
        """The values that a parameter with a choice of them can have."""
        return _literals(cls.model_fields[parameter].annotation)

    @classmethod
    def usual_scale(cls, dtype: str) -> ScaleDtype:
        """The dtype of the scales of a tensor of this dtype, if nobody asks for another."""
        return USUAL_SCALE[dtype]

    @classmethod
    @abstractmethod
    def of(cls, bits: int, *, symmetric: bool, **parameters: Any) -> Self:
        """The scheme of this width; raises ValueError when it cannot be so."""

    @property
    @abstractmethod
    def id(self) -> str:
        """The public name, such as `int4`."""

    @property
    @abstractmethod
    def symmetric(self) -> bool:
        """Whether there is no zero point to store."""

    @property
    @abstractmethod
    def implied_zero(self) -> int:
        """The zero point that is meant where none is stored."""

    @abstractmethod
    def grid(self, xp: Any, lo: AnyArray, hi: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Scale and zero point, both float32, that span [lo, hi] (which includes 0), shaped like lo."""

    @abstractmethod
    def encode(self, xp: Any, x: AnyArray, scale: AnyArray, zero: AnyArray) -> AnyArray:
        """Codes, uint8 (..., g), of x (..., g) on the grid of scale and zero (...,)."""

    @abstractmethod
    def decode(self, xp: Any, codes: AnyArray, scale: AnyArray, zero: AnyArray) -> AnyArray:
        """What codes (..., g) stand for, float32."""

    @abstractmethod
    def refit(
        self, xp: Any, x: AnyArray, codes: AnyArray, scale: AnyArray, zero: AnyArray, weights: AnyArray | None
    ) -> tuple[AnyArray, AnyArray]:
        """The scale and zero point of least weighted squared error with the codes held, where one exists."""

    @property
    def free(self) -> Scheme:
        """The scheme in which a method looks for the grid of each group on its own, before `settle`."""
        return self

    def settle(
        self, xp: Any, x: AnyArray, scale: AnyArray, zero: AnyArray, weights: AnyArray | None
    ) -> tuple[AnyArray, AnyArray]:
        """Grids that a row can have, from those that each of its groups x (..., groups, g) would have on its own.

        What groups of a row share is chosen for the least weighted squared error. By default they share nothing.
        """
        del xp, x, weights
        return scale, zero

    def store_scale(self, xp: Any, scale: AnyArray) -> AnyArray:
        """`scale` as it reads back after being stored: rounded to the scale dtype, float32.

        Zero means an all-zero group and becomes 1; what the dtype cannot hold goes to its limits.
        """
        smallest, largest = SCALE_LIMITS[self.scale_dtype]
        stored = xp.minimum(xp.maximum(scale, smallest), largest)
        if self.scale_dtype != "F32":
            stored = xp.astype(xp.astype(stored, SCALE_DTYPES[self.scale_dtype]), xp.float32)
        return xp.where(scale == 0, 1.0, stored)

    @property
    def has_tensor_scale(self) -> bool:
        """Whether what is stored for its groups are scales times one of the whole tensor."""
        return False

    @property
    def takes_pass(self) -> bool:
        """Whether something has to be known of a whole tensor before any of it is quantized."""
        return self.granularity == "tensor" or self.has_tensor_scale

    @property
    def tensor_divisor(self) -> np.float32 | None:
        """What stored scales are to be divided by, once the tensor is known."""
        return None

    def tensor_scale_for(self, largest: float) -> float:
        """The scale of a tensor of this largest magnitude, by which those of its groups are multiplied."""
        del largest
        return 1.0

    def for_tensor(self, tensor_scale: float) -> Scheme:
        """The same scheme for a tensor of this scale."""
        del tensor_scale
        return self

    @property
    def width(self) -> int | None:
        """Columns that share a scale; None where all do."""
        return {"group": self.group_size, "block": BLOCK}.get(self.granularity)

    @property
    def row_multiple(self) -> int:
        """Rows are quantized in pieces of a multiple of so many."""
        return BLOCK if self.granularity == "block" else ROW_MULTIPLE

    def clips(self, usual: tuple[float, ...]) -> tuple[float, ...]:
        """Parts of a range from which a search of scales is to start."""
        return usual

    def groups(self, cols: int) -> int:
        """Scales per row of `cols` elements; the last group of a row may be short."""
        return -(-cols // self.width) if self.width else 1

    def scale_rows(self, rows: int) -> int:
        """Rows of scales for so many rows of a tensor, which begin with it or a multiple of `row_multiple` later."""
        if self.granularity == "tensor":
            return 1
        return -(-rows // BLOCK) if self.granularity == "block" else rows

    def scales(self, rows: int, cols: int) -> int:
        """Scales of a (rows, cols) tensor."""
        return self.scale_rows(rows) * self.groups(cols)

    def grid_bytes(self, cols: int) -> tuple[int, int]:
        """Bytes of `scale` and of `zero_point` as `QuantizedRows` has them: of a row, or of a tensor with one grid."""
        groups = self.groups(cols)
        return groups * SCALE_DTYPES[self.scale_dtype].itemsize, 0 if self.symmetric else groups

    def grid_arrays(
        self, scale: bytes | memoryview, zero: bytes | memoryview | None, cols: int
    ) -> tuple[Array, CodeArray | None]:
        """`scale` and `zero_point` of `QuantizedRows` from their bytes, for all rows that there are."""
        groups = self.groups(cols)
        zeros = None if zero is None or self.symmetric else np.frombuffer(zero, np.uint8).reshape(-1, groups)
        return np.frombuffer(scale, SCALE_DTYPES[self.scale_dtype]).reshape(-1, groups), zeros

    def stored_grid(self, scale: FloatArray, zero: FloatArray, cols: int) -> tuple[Array, CodeArray | None]:
        """`scale` and `zero_point` of `QuantizedRows` from what a method has found, (rows, groups)."""
        del cols
        return scale.astype(SCALE_DTYPES[self.scale_dtype]), None if self.symmetric else zero.astype(np.uint8)

    def float_grid(self, scale: Array, zero: CodeArray | None, cols: int) -> tuple[FloatArray, FloatArray]:
        """The inverse of `stored_grid`."""
        del cols
        scales = scale.astype(np.float32)
        return scales, np.full_like(scales, self.implied_zero) if zero is None else zero.astype(np.float32)

    def largest_scale(self, scale: Array, cols: int) -> float:
        """The largest of the stored scales, none of which is negative."""
        del cols
        if scale.dtype.itemsize != 2:
            return float(scale.max())
        # As whole numbers: NumPy is slow with dtypes of two bytes.
        return float(scale.reshape(-1)[int(scale.view(np.uint16).argmax())])

    def stored_bytes(self, rows: int, cols: int) -> int:
        """Bytes of a (rows, cols) tensor in this scheme: codes, scales and zero points."""
        scales = self.scales(rows, cols)
        zero_bits = 0 if self.symmetric else scales * self.bits
        stored = rows * row_bytes(cols, self.bits) + scales * SCALE_DTYPES[self.scale_dtype].itemsize
        return stored + -(-zero_bits // 8) + TENSOR_SCALE_BYTES * self.has_tensor_scale


def _literals(annotation: Any) -> tuple[Any, ...]:
    """What the literals of a type say, those of named types and of unions included."""
    if isinstance(annotation, TypeAliasType):
        return _literals(annotation.__value__)
    parts = (part for part in get_args(annotation) if part is not type(None))
    return tuple(value for part in parts for value in (_literals(part) or (part,)))
