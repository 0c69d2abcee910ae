"""Grids to which a layer's inputs may be rounded, one for each group of timesteps, and the error expected of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import TypeAliasType

from service.engine.activation_ranges import clipped_ranges
from service.engine.tensors import FloatArray
from service.engine.time_smoothing import Interpolation, grids_at_steps, largest_jump, smoothed
from service.engine.timesteps import (
    Floats,
    TimeGroups,
    expected_errors,
    group_error,
    optimal_groups,
    uniform_groups,
    with_zero,
)

TimeGrouping = TypeAliasType("TimeGrouping", Literal["optimal", "uniform"])

#: Of the grids unless others are wanted; these have levels enough not to cut anything off.
ACTIVATION_BITS = 8
#: Time and memory of finding optimal groups grow with the square of the timesteps: of more, some neighbours stay
#: together.
MOST_CUTS = 1024


@dataclass(frozen=True, slots=True)
class Wanted:
    """How timesteps are to be grouped: `count` groups at most, cut where `grouping` says, and then smoothed.

    `smoothness_weight` and `boundary_window` are as `smoothed` and `grids_at_steps` take them; `bits` are of the grids.
    """

    count: int
    grouping: TimeGrouping = "optimal"
    smoothness_weight: float = 0.0
    boundary_window: int = 0
    boundary_interpolation: Interpolation = "linear"
    bits: int = ACTIVATION_BITS

    @property
    def is_clipped(self) -> bool:
        """Whether levels are so few that it is better to leave out what is rare."""
        return self.bits < ACTIVATION_BITS

    def most_groups(self, steps: int) -> int:
        """As many are stored at most: steps beside a cut may each have a grid of their own."""
        count = min(self.count, steps)
        return min(steps, count + 2 * self.boundary_window * (count - 1))


@dataclass(frozen=True, slots=True)
class TimeGroupFigures:
    """What is expected of the grids that are stored, and of others, for inputs within the ranges that they are made of.

    groups             how many there are
    expected_error     the squared error of an input, a mean over timesteps by their weights
    optimal_error      the same without smoothing, with as many groups as are wanted and the best cuts
    uniform_error      with cuts at like distances
    static_error       with one grid for all timesteps
    smoothness_before  by what share the larger of two neighbouring scales exceeds the other, at most, as grouped
    smoothness_after   as stored
    """

    groups: int
    expected_error: float
    optimal_error: float
    uniform_error: float
    static_error: float
    smoothness_before: float
    smoothness_after: float


@dataclass(frozen=True, eq=False, slots=True)
class ActivationGrids:
    """Grids as they are stored.

    bounds             (G + 1,): a group of timesteps begins at each but the last, which is T
    scale, zero_point  (G,): a level stands for (code - zero_point) * scale
    """

    bounds: npt.NDArray[np.uint32]
    scale: FloatArray
    zero_point: FloatArray
    figures: TimeGroupFigures

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.bounds.nbytes + self.scale.nbytes + self.zero_point.nbytes


def group_bytes(groups: int) -> int:
    """What so many groups take as they are stored."""
    return 4 * (3 * groups + 1) if groups else 0


def find_grids(
    ranges: npt.ArrayLike, weights: npt.ArrayLike, wanted: Wanted, mean_square: npt.ArrayLike | None = None
) -> ActivationGrids | None:
    """The grids of a layer with inputs in `ranges` (T, 2), whose timesteps count by `weights` (T,).

    Where levels are few and `mean_square` (T, in) is given, what is rare at a step is left out of its range. A step at
    which all inputs are 0 goes with the one before it; None where they are so at all steps.
    """
    if mean_square is not None and wanted.is_clipped:
        ranges = clipped_ranges(ranges, mean_square, wanted.bits)
    low, high = with_zero(ranges)
    live = high > low
    if not live.any():
        return None
    limits, counts = _filled(np.stack([low, high], axis=1), live), np.where(live, np.asarray(weights, np.float64), 0.0)
    uniform = uniform_groups(limits, wanted.count, wanted.bits)
    optimal = _optimal(limits, wanted.count, counts, uniform)
    chosen = optimal if wanted.grouping == "optimal" else uniform
    smooth = smoothed(chosen, limits, wanted.smoothness_weight, counts)
    scale, zero = grids_at_steps(smooth, wanted.boundary_window, wanted.boundary_interpolation)
    is_new = (np.diff(scale) != 0) | (np.diff(zero) != 0)
    starts = np.union1d(smooth.bounds[:-1], np.flatnonzero(is_new) + 1)
    # Beside a cut, where grids are those of no group, by their own ends.
    own = expected_errors(limits, -zero * scale, (2**wanted.bits - 1 - zero) * scale, wanted.bits)
    expected = float(own @ counts) if wanted.boundary_window else group_error(smooth, limits, counts)
    figures = TimeGroupFigures(
        groups=len(starts),
        expected_error=expected,
        optimal_error=group_error(optimal, limits, counts),
        uniform_error=group_error(uniform, limits, counts),
        static_error=group_error(uniform_groups(limits, 1, wanted.bits), limits, counts),
        smoothness_before=largest_jump(chosen.scale),
        smoothness_after=largest_jump(scale),
    )
    bounds = np.append(starts, len(limits)).astype(np.uint32)
    stored = np.maximum(scale[starts], np.finfo(np.float32).tiny).astype(np.float32)
    return ActivationGrids(bounds, stored, zero[starts].astype(np.float32), figures)


def _filled(limits: Floats, live: npt.NDArray[np.bool_]) -> Floats:
    """Ranges (T, 2) of which those that are not live are as the last before them that is, or as the first."""
    last = np.maximum.accumulate(np.where(live, np.arange(len(live)), -1))
    return np.asarray(limits[np.where(last < 0, np.argmax(live), last)])


def _optimal(limits: Floats, count: int, weights: Floats, uniform: TimeGroups) -> TimeGroups:
    """The best groups; of too many steps to try all cuts, the best of some cuts, and never worse than uniform ones."""
    steps = len(limits)
    each = -(-steps // MOST_CUTS)
    if each == 1:
        return optimal_groups(limits, count, uniform.bits, weights)
    starts = np.arange(0, steps, each)
    low, high = np.minimum.reduceat(limits[:, 0], starts), np.maximum.reduceat(limits[:, 1], starts)
    coarse = optimal_groups(np.stack([low, high], axis=1), count, uniform.bits, np.add.reduceat(weights, starts))
    found = TimeGroups(np.minimum(coarse.bounds * each, steps), coarse.low, coarse.high, uniform.bits)
    return min(found, uniform, key=lambda groups: group_error(groups, limits, weights))
