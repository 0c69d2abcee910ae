"""Descent on the exact output error (w - v) G (w - v)ᵀ of rows w that are stored as v, group by group.

Within a group only its part of G counts, and h, what it would have to make up for if it were all 0: its values v add
v (G v - 2 h) to the error. So several grids are tried at once for each group, each with its own codes: coordinate
by coordinate the best one given all others, the scale by least squares, in turn. As that ends where no coordinate alone
can move, every block of columns is walked through anew before (see `walk.py`), towards what would make up for all that
is left; rows that do not gain by it stay as they were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from service.engine.methods.coded import LONGEST_GROUP, Coded, spans
from service.engine.methods.walk import Factor, factored, walk
from service.engine.schemes.base import AnyArray, Scheme

#: Columns of which the products with all others are made anew together.
BLOCK = 128
#: Grids tried for a group: its scale times this, and its zero point plus this. The first is the one it has.
TRIALS = ((1.0, 0), (0.85, 0), (0.93, 0), (1.08, 0), (1.0, 1), (1.0, -1))
#: Times that codes and scale of a trial are fitted to each other.
PASSES = 3


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


def descend(xp: Any, x: AnyArray, gram: AnyArray, coded: Coded, sweeps: int, added: float) -> Coded:
    """Go over all groups of rows x `sweeps` times, from the second time on through a walk in each block.

    No row gets a larger output error. For the walks `added` is added to the diagonal of `gram`.
    """
    codes, scale, zero, values = (
        xp.asarray(a, copy=True) for a in (coded.codes, coded.scale, coded.zero, coded.values)
    )
    better = replace(coded, codes=codes, scale=scale, zero=zero, values=values)
    blocks = list(spans(x.shape[1], block_columns(coded.group)))
    walks = [BlockWalk.of(xp, gram[first:stop, first:stop], added) for first, stop in blocks] if sweeps > 1 else []
    for sweep in range(sweeps):
        for number, (first, stop) in enumerate(blocks):
            rest = (x - values) @ gram[:, first:stop]
            if sweep:
                walks[number].improve(xp, x, better, gram[first:stop, first:stop], rest, first)
            else:
                _improve_groups(xp, x, better, gram[first:stop, first:stop], rest, first)
    return better


def block_columns(group: int) -> int:
    """Columns of a block: whole groups, unless these are too long."""
    return max(BLOCK, group) if group <= LONGEST_GROUP else BLOCK


@dataclass(frozen=True, slots=True)
class BlockWalk:
    """A walk through a block, given all other columns.

    factor   of the block's part of the damped Gram matrix
    inverse  of that part, float32
    """

    factor: Factor
    inverse: AnyArray

    @classmethod
    def of(cls, xp: Any, gram: AnyArray, added: float) -> BlockWalk:
        """For this part of the Gram matrix."""
        wide = xp.astype(gram, xp.float64) + added * xp.eye(gram.shape[0], dtype=xp.float64)
        return cls(factored(xp, gram, added), xp.astype(xp.linalg.inv(wide), xp.float32))

    def improve(self, xp: Any, x: AnyArray, coded: Coded, gram: AnyArray, rest: AnyArray, first: int) -> None:
        """Walk anew and improve groups from there, in the rows that gain by it."""
        columns = slice(first, first + gram.shape[0])
        groups = slice(first // coded.group, (columns.stop - 1) // coded.group + 1)
        places = [(coded.codes, columns), (coded.values, columns), (coded.scale, groups), (coded.zero, groups)]
        before = [xp.asarray(array[:, place], copy=True) for array, place in places]
        left, values = xp.asarray(rest, copy=True), before[1]
        codes = walk(xp, values + rest @ self.inverse, coded, self.factor, first)
        coded.codes[:, columns] = codes
        for start, end in spans(gram.shape[0], coded.group):
            part, group = slice(first + start, first + end), (first + start) // coded.group
            coded.values[:, part] = coded.scheme.decode(
                xp, codes[:, start:end], coded.scale[:, group], coded.zero[:, group]
            )
        rest += (values - coded.values[:, columns]) @ gram
        _improve_groups(xp, x, coded, gram, rest, first)
        lost = values - coded.values[:, columns]
        gains = xp.sum(lost * (left + left + lost @ gram), axis=1) < 0
        for (array, place), old in zip(places, before, strict=True):
            array[:, place] = xp.where(gains[:, None], array[:, place], old)


def _improve_groups(xp: Any, x: AnyArray, coded: Coded, gram: AnyArray, rest: AnyArray, first: int) -> None:
    """All groups of a block at column `first`, of which `rest` is left to make up for."""
    for start, end in spans(gram.shape[0], min(coded.group, LONGEST_GROUP)):
        _improve(xp, x, coded, gram, rest, first, slice(start, end))


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
