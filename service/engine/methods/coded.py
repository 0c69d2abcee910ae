"""Rows as they are stored, and what that stands for: what the steps of `gptq` hand on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from service.engine.methods.base import Solution
from service.engine.schemes.base import BLOCK, AnyArray, Scheme
from service.engine.schemes.integer import IntegerScheme
from service.engine.schemes.table import TableScheme

#: Of longer groups the scale stays as it was begun.
LONGEST_GROUP = 256


@dataclass(frozen=True, slots=True)
class Coded:
    """Rows as they are stored, and what that stands for.

    codes uint8 and values float32 (rows, cols), scale and zero float32 (rows, groups)
    """

    scheme: Scheme
    codes: AnyArray
    scale: AnyArray
    zero: AnyArray
    values: AnyArray

    @classmethod
    def of(cls, xp: Any, scheme: Scheme, solution: Solution) -> Coded:
        """A solution with its values; scales of blocks are repeated for each row."""
        scale, zero = solution.scale, solution.zero
        if scheme.granularity == "block":
            blocks = xp.arange(solution.codes.shape[0]) // BLOCK
            scale, zero = (xp.take(grids, blocks, axis=0) for grids in (scale, zero))
        return cls(scheme, solution.codes, scale, zero, solution.codes).with_codes(xp, solution.codes)

    @property
    def solution(self) -> Solution:
        """Without the values."""
        each = BLOCK if self.scheme.granularity == "block" else 1
        return Solution(self.codes, self.scale[::each, :], self.zero[::each, :])

    @property
    def group(self) -> int:
        """Columns from one group to the next."""
        return int(self.scheme.width or self.codes.shape[1])

    @property
    def is_free(self) -> bool:
        """Whether a group's scale may be any that can be stored, whatever the others have."""
        scheme = self.scheme
        plain = isinstance(scheme, (IntegerScheme, TableScheme)) and scheme.granularity in ("channel", "group")
        return plain and self.group <= LONGEST_GROUP

    def with_codes(self, xp: Any, codes: AnyArray) -> Coded:
        """Other codes on the same grids."""
        values = xp.empty(codes.shape, dtype=xp.float32)
        for group, (first, stop) in enumerate(spans(codes.shape[1], self.group)):
            values[:, first:stop] = self.scheme.decode(
                xp, codes[:, first:stop], self.scale[:, group], self.zero[:, group]
            )
        return replace(self, codes=codes, values=values)

    def coded(self, xp: Any, wanted: AnyArray, column: int) -> tuple[AnyArray, AnyArray]:
        """The codes next to `wanted` (rows,) in this column, and what they stand for."""
        grid = self.scale[:, column // self.group], self.zero[:, column // self.group]
        codes = self.scheme.encode(xp, wanted[:, None], *grid)
        return codes[:, 0], self.scheme.decode(xp, codes, *grid)[:, 0]

    def output_errors(self, xp: Any, x: AnyArray, gram: AnyArray) -> AnyArray:
        """Of each row of x, (rows,)."""
        error = x - self.values
        return xp.sum((error @ gram) * error, axis=1)

    def unless_better(self, xp: Any, x: AnyArray, gram: AnyArray, other: Coded) -> Coded:
        """Each row from the one of less output error."""
        better = (other.output_errors(xp, x, gram) < self.output_errors(xp, x, gram))[:, None]
        names = ("codes", "scale", "zero", "values")
        return replace(self, **{n: xp.where(better, getattr(other, n), getattr(self, n)) for n in names})


def spans(count: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, stop) of every `step` of so many, the last of which may be short."""
    return ((first, min(first + step, count)) for first in range(0, count, step))
