"""Where an activation grid had best end at each timestep: short of the largest input, which is rare."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from service.engine.timesteps import Floats, with_zero

#: Shares of the range, on either side of 0, at which the grid may end.
CLIPS = np.geomspace(1.0, 0.15, 24)
#: In which a column's scale is found; and mean squares and shares of them that are as good as 0.
ROUNDS, SMALLEST, SMALLEST_SHARE = 6, 1e-30, 0.05


def clipped_ranges(ranges: npt.ArrayLike, mean_square: npt.ArrayLike, bits: int) -> Floats:
    """For each step the range (T, 2) of least expected squared error with 2**bits levels, within `ranges` (T, 2).

    What is beyond the grid goes to its end, the rest is rounded. `mean_square` (T, in) tells the columns of the layer's
    input apart: each is taken to be Laplacian about 0 at one step, cut off at the ends of the range, where activation
    functions pile inputs up (ACIQ, Banner et al. 2019, has one distribution for all; columns of different size are what
    makes the long tails of a whole input).
    """
    low, high = with_zero(ranges)
    ends = np.empty((len(low), 2))
    for step, (least, most, square) in enumerate(zip(low, high, np.asarray(mean_square, np.float64), strict=True)):
        spread = _spread(square, least, most)
        below, above = (_lost(end, spread) for end in (-least, most))  # (clips,)
        width = most * CLIPS - least * CLIPS[:, None]  # (clips below, clips above)
        error = below[:, None] + above + (width / (2**bits - 1)) ** 2 / 12
        best_below, best_above = np.unravel_index(int(error.argmin()), error.shape)
        ends[step] = least * CLIPS[best_below], most * CLIPS[best_above]
    return ends


def _spread(square: Floats, least: float, most: float) -> Floats:
    """The scale (in,) at which Laplacian columns that are cut off at both ends have these mean squares (in,)."""
    fed = np.maximum(square, SMALLEST)
    spread = np.sqrt(fed / 2)
    for _ in range(ROUNDS):
        kept = _kept(-least / spread) + _kept(most / spread)
        spread = np.sqrt(fed / np.maximum(kept, SMALLEST_SHARE))
    return np.asarray(np.where(square > SMALLEST, spread, 0.0))


def _kept(end: Floats) -> Floats:
    """Of the scale's square, what the mean square has from one side that is cut off at `end` scales."""
    return 1 - np.exp(-end) * (1 + end)


def _lost(end: float, spread: Floats) -> Floats:
    """The expected squared error (clips,), a mean over columns, of clipping inputs on one side at CLIPS of its end."""
    fed = spread[spread > 0]
    if not fed.size or end == 0:
        return np.zeros(len(CLIPS))
    at = end * CLIPS[:, None] / fed  # (clips, columns), as are all below
    rest = end * (1 - CLIPS[:, None]) / fed
    # The integral of (x - at)² exp(-x) / 2 from `at` to the range's end, and what is beyond that, as if it were there.
    beyond = np.exp(-at) * _kept(rest)
    return np.asarray((beyond * fed**2).sum(axis=1) / spread.size)
