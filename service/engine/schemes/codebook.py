"""Codes that index a fixed table of levels: x ≈ table[q] * s, with s the group's absolute maximum.

NF4 is the table of QLoRA (Dettmers et al. 2023, appendix E): quantiles of a normal distribution,
with an exact zero.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from service.engine.schemes.base import AnyArray, GroupSize, PlainScaleDtype
from service.engine.schemes.table import TableScheme
from service.engine.tensors import FloatArray

NF4_TABLE = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
#: A value goes to the level above when it is greater than the midpoint (rounded to float32).
NF4_MIDPOINTS = ((NF4_TABLE[1:].astype(np.float64) + NF4_TABLE[:-1]) / 2).astype(np.float32)


class CodebookScheme(TableScheme):
    """`nf4`; parameters: granularity, group_size, scale_dtype."""

    ids: ClassVar[dict[str, int]] = {"nf4": 4}

    bits: Literal[4] = 4
    granularity: Literal["tensor", "channel", "group"] = "group"
    group_size: GroupSize | None = 64
    scale_dtype: PlainScaleDtype = "F16"

    @property
    def id(self) -> str:
        """The table's name."""
        return "nf4"

    @property
    def table(self) -> FloatArray:
        """See above."""
        return NF4_TABLE

    @property
    def divisor(self) -> np.float32:
        """The table ends at 1."""
        return np.float32(1.0)

    def encode(self, xp: Any, x: AnyArray, scale: AnyArray, zero: AnyArray) -> AnyArray:  # noqa: ARG002
        """The nearest level of x * (1/s); a tie goes to the lower one."""
        t = x * (1.0 / scale)[..., None]
        return xp.astype(xp.searchsorted(xp.asarray(NF4_MIDPOINTS), t, side="left"), xp.uint8)
