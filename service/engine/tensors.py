"""What is known of a tensor, and what a quantized piece of one looks like."""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import numpy.typing as npt

from service.engine.records import record

if TYPE_CHECKING:
    from service.engine.metrics import ErrorSums
    from service.engine.schemes.base import Scheme

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.uint8]
HalfArray = npt.NDArray[np.float16]

#: Elements of the rows to which low-rank parts are added at once.
TILE_ELEMENTS = 1 << 20

#: The floating dtypes that can be quantized, by their safetensors name.
FLOAT_DTYPES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

#: Bits per element of every dtype of the safetensors format; what is not in FLOAT_DTYPES is copied.
DTYPE_BITS: dict[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@record(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its model's header describes it.

    `file` is relative to the model's root; `offset` and `nbytes` say where the stored bytes lie in
    it. For a tensor that its format stores quantized, `dtype` is what it reads back as,
    `stored_as` the scheme, and `nbytes` the bytes of all its parts.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: PurePosixPath
    offset: int
    nbytes: int
    stored_as: str | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix: its first dimension."""
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        """Columns of the tensor seen as a matrix: all other dimensions together."""
        return math.prod(self.shape[1:])

    @property
    def is_float(self) -> bool:
        """Whether the engine can compute with it."""
        return self.dtype in FLOAT_DTYPES


@record(frozen=True, slots=True)
class QuantizedRows:
    """Some rows of a tensor, quantized and packed.

    packed      uint8 (rows, row_bytes): unsigned codes, element i of a row at bit i*b, little
                endian, every row filled up with zero bits to a multiple of 32
    scale       (rows, groups) in the scheme's scale dtype; (1, 1) where one scale serves the tensor; of blocks a
                row for each row of blocks, of which the first begins with these rows
    zero_point  uint8, shaped like scale, in the codes' own unsigned range; None where the scheme
                is symmetric (the integer schemes then mean 2**(b-1)); of nested schemes, scale and zero_point are
                bytes (rows, n), see `NestedScheme.stored_grid`
    errors      what these rows lost
    tensor_scale  what `scale` is to be divided by, where the scheme has such a scale for the tensor
    up          (rows, rank) float16, where the tensor has a low-rank part: times its other factor, which is the
                tensor's, to be added to what the codes stand for
    """

    scheme: Scheme
    cols: int
    packed: CodeArray
    scale: Array
    zero_point: CodeArray | None
    errors: ErrorSums
    tensor_scale: np.float32 | None = None
    up: HalfArray | None = None

    @property
    def rows(self) -> int:
        """Number of rows in this piece."""
        return int(self.packed.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        parts = (self.packed, self.scale, self.zero_point, self.up)
        return sum(part.nbytes for part in parts if part is not None)


def low_rank_bytes(rows: int, cols: int, rank: int) -> int:
    """What a low-rank part takes as it is stored."""
    return 2 * rank * (rows + cols)


def add_low_rank(x: FloatArray, up: HalfArray, down: HalfArray) -> None:
    """Add up (rows, r) times down (r, cols) to x (rows, cols), in tiles."""
    wide = down.astype(np.float32)
    step = max(1, TILE_ELEMENTS // max(1, x.shape[1]))
    for start in range(0, len(x), step):
        x[start : start + step] += up[start : start + step].astype(np.float32) @ wide


def codes_of(info: TensorInfo, nbytes: int) -> int:
    """Of a tensor that is stored quantized: the stored bytes behind so many of those that it reads back as."""
    return -(-info.nbytes * nbytes // max(1, info.size * FLOAT_DTYPES[info.dtype].itemsize))


def non_finite(info: TensorInfo) -> str:
    """What a tensor holds in which sums of float32 are not finite, as the end of a sentence about it."""
    if info.dtype == "F64":
        return "holds a NaN, an infinity or a number too large for float32, in which weights are quantized"
    return "holds a NaN or an infinity"
