"""Activation scales without jumps: those of neighbouring time groups fitted together, and a passage at each cut."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import TypeAliasType

from service.engine.timesteps import Floats, TimeGroups, with_zero

Interpolation = TypeAliasType("Interpolation", Literal["linear", "cubic", "sigmoid"])

#: Scales between the smallest and the largest of a layer that are tried for each group, beside all groups' own.
TRIED_SCALES = 129
#: The logistic function is taken from minus this to this.
SIGMOID_ENDS = 6.0


def smoothed(
    groups: TimeGroups, ranges: npt.ArrayLike, smoothness_weight: float, weights: npt.ArrayLike | None = None
) -> TimeGroups:
    """The same groups, their ranges stretched about 0, with the least sum of

        error / error before  +  smoothness_weight * sum of (log s_g - log s_(g + 1))²

    over scales s among those that are tried, exactly (the groups are a chain: Viterbi 1967). Scales only grow, so that
    nothing is cut off. A weight of 0 changes nothing. `ranges` (T, 2) and `weights` (T,) are those that the groups were
    made of. Groups in which all inputs are 0 have no scale, and their neighbours are each other's.
    """
    live = np.flatnonzero(groups.high > groups.low)
    if smoothness_weight == 0 or len(live) < 2:
        return groups
    own = groups.scale[live]
    tried = np.unique(np.concatenate([own, np.geomspace(own.min(), own.max(), TRIED_SCALES)]))
    error = _steps_that_count(groups, ranges, weights)[live, None] * tried**2  # (live, tried), but for a factor
    error[tried < own[:, None]] = np.inf
    before = error.min(axis=1).sum()
    logs = np.log(tried)
    penalty = smoothness_weight * (logs[:, None] - logs) ** 2
    chosen = _least_path(error / before if before > 0 else error, penalty)
    stretch = np.ones(len(groups.low))
    stretch[live] = tried[chosen] / own
    return TimeGroups(groups.bounds, groups.low * stretch, groups.high * stretch, groups.bits)


def grids_at_steps(groups: TimeGroups, window: int, interpolation: Interpolation) -> tuple[Floats, Floats]:
    """Scale and zero point (T,) for each step, where up to `window` steps on either side of a cut lie between groups.

    A step belongs to one cut only: a window ends in the middle of a group. Scales are interpolated as logarithms,
    and zero points to the nearest whole number.
    """
    at = groups.group_of_step
    scale, zero = np.log(groups.scale), groups.zero_point
    scales, zeros = scale[at], zero[at]
    lengths = np.diff(groups.bounds)
    for left, cut in enumerate(groups.bounds[1:-1]):
        reach = min(window, *(lengths[left : left + 2] // 2))
        steps = np.arange(cut - reach, cut + reach)
        share = _share((steps - (cut - reach) + 0.5) / (2 * max(reach, 1)), interpolation)
        scales[steps] = scale[left] + share * (scale[left + 1] - scale[left])
        zeros[steps] = np.rint(zero[left] + share * (zero[left + 1] - zero[left]))
    return np.exp(scales), zeros


def largest_jump(scale: npt.ArrayLike) -> float:
    """The smoothness score: by what share the larger of two neighbouring scales exceeds the other, at most."""
    logs = np.log(np.asarray(scale, np.float64))
    return float(np.expm1(np.abs(np.diff(logs)).max(initial=0.0)))


def _steps_that_count(groups: TimeGroups, ranges: npt.ArrayLike, weights: npt.ArrayLike | None) -> Floats:
    """The weights (G,) of each group's steps together, but of those whose inputs are all 0."""
    low, high = with_zero(ranges)
    counts = np.ones(len(low)) if weights is None else np.asarray(weights, np.float64)
    return np.asarray(np.add.reduceat(counts * (high > low), groups.bounds[:-1]))


def _least_path(cost: Floats, penalty: Floats) -> npt.NDArray[np.int64]:
    """For each row of cost (n, k) a column, with the least sum of costs and of penalties (k, k) between neighbours."""
    total = cost[0]
    came_from = np.zeros(cost.shape, np.int64)
    for row in range(1, len(cost)):
        through = total[:, None] + penalty
        came_from[row] = np.argmin(through, axis=0)
        total = np.min(through, axis=0) + cost[row]
    path = np.empty(len(cost), np.int64)
    path[-1] = np.argmin(total)
    for row in range(len(cost) - 1, 0, -1):
        path[row - 1] = came_from[row, path[row]]
    return path


def _share(x: Floats, interpolation: Interpolation) -> Floats:
    """How much of the next group there is at x, from 0 to 1, of the way."""
    if interpolation == "linear":
        return x
    if interpolation == "cubic":
        return x * x * (3 - 2 * x)
    ends = 1 / (1 + np.exp([SIGMOID_ENDS, -SIGMOID_ENDS]))
    return np.asarray((1 / (1 + np.exp(SIGMOID_ENDS * (1 - 2 * x))) - ends[0]) / (ends[1] - ends[0]))
