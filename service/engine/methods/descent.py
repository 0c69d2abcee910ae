"""Descent on the exact output error (w - v) G (w - v)ᵀ of rows w that are stored as v, group by group.

Within a group only its part of G counts, and h, what it would have to make up for if it were all 0: its values v add
v (G v - 2 h) to the error. So several grids are tried at once for each group, each with its own codes: coordinate
by coordinate the best one given all others, the scale by least squares, in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from service.engine.methods.base import Solution
from service.engine.schemes.base import BLOCK as SCALE_BLOCK
from service.engine.schemes.base import AnyArray, Scheme
from service.engine.schemes.integer import IntegerScheme
from service.engine.schemes.table import TableScheme

#: Columns of which the products with all others are made anew together. Longer groups have a block of their own, ...
BLOCK = 128
#: ... up to this length; of longer ones the scale stays.
LONGEST_GROUP = 256
#: Grids tried for a group: its scale times this, and its zero point plus this. The first is the one it has.
TRIALS = ((1.0, 0), (0.85, 0), (0.93, 0), (1.08, 0), (1.0, 1), (1.0, -1))
#: Times that codes and scale of a trial are fitted to each other.
PASSES = 3


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
            blocks = xp.arange(solution.codes.shape[0]) // SCALE_BLOCK
            scale, zero = (xp.take(grids, blocks, axis=0) for grids in (scale, zero))
        return cls(scheme, solution.codes, scale, zero, solution.codes).with_codes(xp, solution.codes)

    @property
    def solution(self) -> Solution:
        """Without the values."""
        each = SCALE_BLOCK if self.scheme.granularity == "block" else 1
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
        for group, (first, stop) in enumerate(_spans(codes.shape[1], self.group)):
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


@dataclass(slots=True)
class _Trials:
    """Several grids for a group, each with its codes: (rows, trials, g), scale and zero (rows, trials).

    rest  h - G v: what is left to make up for
    """

    scheme: Scheme
    codes: AnyArray
    values: AnyArray
    rest: AnyArray
    scale: AnyArray
    zero: AnyArray

    def fit_codes(self, xp: Any, x: AnyArray, gram: AnyArray) -> None:
        """One column of x (rows, g) after the other, to the best code given all others."""
        for j in range(gram.shape[0]):
            old, fed = self.values[:, :, j], float(gram[j, j])
            # Of a column that is never fed the next one.
            wanted = old + self.rest[:, :, j] / fed if fed > 0 else xp.broadcast_to(x[:, j : j + 1], old.shape)
            codes = self.scheme.encode(xp, wanted[..., None], self.scale, self.zero)
            values = self.scheme.decode(xp, codes, self.scale, self.zero)
            self.rest -= (values - old[..., None]) * gram[j, :]
            self.codes[:, :, j], self.values[:, :, j] = codes[..., 0], values[..., 0]

    def fit_scales(self, xp: Any, h: AnyArray) -> None:
        """Least squares with the codes held."""
        made_up = h - self.rest
        numerator, denominator = xp.sum(self.values * h, axis=-1), xp.sum(self.values * made_up, axis=-1)
        usable = (numerator > 0) & (denominator > 0)
        share = xp.where(usable, numerator, 1.0) / xp.where(usable, denominator, 1.0)
        scale = self.scheme.store_scale(xp, self.scale * share)
        self.rest = h - made_up * (scale / self.scale)[..., None]
        self.scale = scale
        self.values = self.scheme.decode(xp, self.codes, scale, self.zero)

    def errors(self, xp: Any, h: AnyArray) -> AnyArray:
        """Of each trial, (rows, trials), less what no grid changes."""
        return -xp.sum(self.values * (h + self.rest), axis=-1)


def descend(xp: Any, x: AnyArray, gram: AnyArray, coded: Coded, sweeps: int) -> Coded:
    """Go over all groups of rows x `sweeps` times; no row gets a larger output error."""
    codes, scale, zero, values = (
        xp.asarray(a, copy=True) for a in (coded.codes, coded.scale, coded.zero, coded.values)
    )
    better = replace(coded, codes=codes, scale=scale, zero=zero, values=values)
    for _ in range(sweeps):
        for first, stop in _spans(x.shape[1], max(BLOCK, coded.group) if coded.group <= LONGEST_GROUP else BLOCK):
            rest = (x - values) @ gram[:, first:stop]
            for start, end in _spans(stop - first, min(coded.group, LONGEST_GROUP)):
                _improve(xp, x, better, gram[first:stop, first:stop], rest, first, slice(start, end))
    return better


def _improve(xp: Any, x: AnyArray, coded: Coded, gram: AnyArray, rest: AnyArray, first: int, span: slice) -> None:
    """Replace codes and grid of the columns `span` of a block at column `first` where there are better ones."""
    columns, group = slice(first + span.start, first + span.stop), (first + span.start) // coded.group
    inner, values = gram[span, span], coded.values[:, columns]
    h = rest[:, span] + values @ inner
    trials = _started(xp, coded, group, values, rest[:, span])
    least = -xp.sum(values * (h + rest[:, span]), axis=-1)
    for _ in range(PASSES):
        trials.fit_codes(xp, x[:, columns], inner)
        if trials.scale.shape[1] > 1:
            trials.fit_scales(xp, h[:, None, :])
    errors = trials.errors(xp, h[:, None, :])
    codes, scale, zero, new = coded.codes[:, columns], coded.scale[:, group], coded.zero[:, group], values
    for trial in range(errors.shape[1]):
        better = errors[:, trial] < least
        least = xp.where(better, errors[:, trial], least)
        scale = xp.where(better, trials.scale[:, trial], scale)
        zero = xp.where(better, trials.zero[:, trial], zero)
        codes = xp.where(better[:, None], trials.codes[:, trial, :], codes)
        new = xp.where(better[:, None], trials.values[:, trial, :], new)
    rest -= (new - values) @ gram[span, :]
    coded.codes[:, columns], coded.values[:, columns] = codes, new
    coded.scale[:, group], coded.zero[:, group] = scale, zero


def _started(xp: Any, coded: Coded, group: int, values: AnyArray, rest: AnyArray) -> _Trials:
    """Trials for a group, all with the values that it has, from which they are to find their codes."""
    scheme = coded.scheme
    scale, zero = coded.scale[:, group], coded.zero[:, group]
    scales, zeros = [scale], [zero]
    if coded.is_free:
        top = (1 << scheme.bits) - 1
        moves = [(factor, shift) for factor, shift in TRIALS[1:] if not (shift and scheme.symmetric)]
        scales += [scheme.store_scale(xp, scale * factor) for factor, _ in moves]
        zeros += [xp.clip(zero + shift, 0, top) for _, shift in moves]
    shape = (values.shape[0], len(scales), values.shape[1])
    values, rest = (xp.asarray(xp.broadcast_to(a[:, None, :], shape), copy=True) for a in (values, rest))
    codes = xp.zeros(shape, dtype=xp.uint8)
    return _Trials(scheme, codes, values, rest, xp.stack(scales, axis=1), xp.stack(zeros, axis=1))


def _spans(count: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, stop) of every `step` of so many, the last of which may be short."""
    return ((first, min(first + step, count)) for first in range(0, count, step))
