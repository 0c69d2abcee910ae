"""What the kernels are to reach, beside a copy of memory and beside others, and what limits them where they do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ABOUT_MARKS = """
## Marks

*needed* and *reached* are shares of the rate of a copy of the input, or how often ours is faster than another. Every
figure of ours is with metrics and the check for finite values, which nobody can ask to go without: it is held to the
mark for that, 0.45; 0.6 is the mark without them.
"""


@dataclass(frozen=True, slots=True)
class Mark:
    """For each dtype what is needed of one of our lines, beside a peer's or the copy; and what limits it."""

    what: str
    needed: Mapping[str, float]
    limit: str
    beside: str = ""

    def verdict(self, needed: float, reached: float | None) -> list[str]:
        """Cells: what is needed, what was reached, whether that is enough, and else why."""
        if reached is None:
            return [f"{needed:g}", "", "absent", ""]
        met = reached >= needed
        return [f"{needed:g}", f"{reached:.3g}", "met" if met else "missed", "" if met else self.limit]


def _all(needed: float) -> dict[str, float]:
    return {"F32": needed, "F16": needed, "BF16": needed}


_ARITHMETIC = (
    "arithmetic: a vector of 16 takes 11 instructions, 6 of them for the metrics, and 2 bytes bring as many as 4"
)
_TABLE = "arithmetic: 15 instructions for a vector of 16, 7 of them to find the place in the table"
_SEARCH = (
    "arithmetic: up to 144 passes of 7 instructions for 32 elements, and after each a fit that takes a third of the "
    "time; 16-bit input has twice the elements in a byte"
)
_MEMORY = "memory"

BESIDE_COPY = (
    Mark("int4 minmax", _all(0.45), _ARITHMETIC),
    Mark("int8 minmax", _all(0.45), _ARITHMETIC),
    Mark("nf4 minmax", _all(0.45), _TABLE),
    Mark("int4 mse, 16 starts", _all(0.05), _SEARCH),
    Mark("int4 dequantize", _all(0.6), _MEMORY),
    Mark("compare", _all(0.6), "arithmetic: sums of five kinds in float64"),
)
BESIDE_OTHERS = (
    Mark("int4 minmax", {"F32": 3, "F16": 5, "BF16": 5}, _ARITHMETIC, "ggml: Q4_0"),
    Mark("int8 minmax", _all(6), _ARITHMETIC, "ggml: Q8_0"),
    Mark("int4 minmax", _all(10), _ARITHMETIC, "torch eager, then nibbles packed: int4"),
    Mark("int4 minmax", _all(10), _ARITHMETIC, "torchao, not packed: int4"),
    Mark("int4 minmax", _all(20), _ARITHMETIC, "compressed-tensors, quantize and pack: int4"),
    Mark("int4 mse, 16 starts", _all(30), _SEARCH, "HQQ: int4"),
    Mark("int4 mse, 16 starts", _all(1), _SEARCH, "ggml: Q4_K"),
)
