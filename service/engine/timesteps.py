"""Timesteps of a diffusion model: how much each counts, and the groups that share an activation scale.

Takes what calibration gives, as arrays. In `ranges` (T, 2) stand the smallest and the largest input of a layer at each
timestep, in the order in which the steps of the file lie; grids hold 0 as well. A group [a, b) of steps has the grid of
2**bits levels over the union of their ranges, s = (high - low) / (2**bits - 1), and each of its steps the error
s²/12 that rounding to such a grid is expected to make (Bennett 1948). Grouping makes the (weighted) sum of these least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from service.errors import InvalidConfig

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Schedule = Literal["snr_linear", "snr_cosine"]

#: Steps of the schedule that a model was trained with: timesteps are numbers below it.
TRAINED_STEPS = 1000
#: Where the signal is this much stronger than the noise, steps count alike (Hang et al. 2023).
LARGEST_SNR = 5.0


@dataclass(frozen=True, eq=False, slots=True)
class TimeGroups:
    """Contiguous groups of steps, each with the range of its activation grid.

    bounds     (G + 1,): group g has the steps bounds[g] to bounds[g + 1] - 1
    low, high  (G,): the grid's ends, low <= 0 <= high
    bits       of the grid
    """

    bounds: Ints
    low: Floats
    high: Floats
    bits: int

    @property
    def scale(self) -> Floats:
        """(G,): distance of neighbouring levels; 1 where all inputs are 0."""
        return step_size(self.low, self.high, self.bits)

    @property
    def zero_point(self) -> Floats:
        """(G,): whole numbers from 0 to 2**bits - 1, the code that stands for 0."""
        return np.rint(-self.low / self.scale)

    @property
    def group_of_step(self) -> Ints:
        """(T,): the group in which each step is."""
        return np.repeat(np.arange(len(self.low)), np.diff(self.bounds))


def step_size(low: Floats, high: Floats, bits: int) -> Floats:
    """Distance of neighbouring levels of grids from `low` to `high`; 1 where both are 0."""
    width = (high - low) / (2**bits - 1)
    return np.where(width > 0, width, 1.0)


def optimal_groups(ranges: npt.ArrayLike, count: int, bits: int, weights: npt.ArrayLike | None = None) -> TimeGroups:
    """`count` groups (at most T) of least expected error, by dynamic programming: exact.

    `weights` (T,) say how much the error at each step counts; all alike where not given.
    """
    low, high = with_zero(ranges)
    steps, count = len(low), min(count, len(low))
    # Inputs that are all 0 stay so on every grid.
    cost = _costs(low, high, bits, _weights(weights, steps) * (high > low))
    best = cost[0]  # (T + 1,): error of the first b steps in as many groups as were added
    cuts = np.zeros((count, steps + 1), np.int64)
    for group in range(1, count):
        through = best[:, None] + cost  # (T + 1, T + 1): the last group is [a, b)
        cuts[group] = np.argmin(through, axis=0)
        best = np.min(through, axis=0)
    bounds = [steps]
    for group in range(count - 1, -1, -1):
        bounds.append(int(cuts[group, bounds[-1]]))
    return _grouped(low, high, np.array(bounds[::-1]), bits)


def uniform_groups(ranges: npt.ArrayLike, count: int, bits: int) -> TimeGroups:
    """`count` groups (at most T) whose lengths differ by one step at most."""
    low, high = with_zero(ranges)
    count = min(count, len(low))
    return _grouped(low, high, np.arange(count + 1) * len(low) // count, bits)


def expected_errors(ranges: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike, bits: int) -> Floats:
    """The expected squared error (T,) of an input at each step on the grids from `low` to `high` (T,).

    Values beyond the grid go to its end; for that, those of a step are taken to be spread evenly over its range.
    """
    least, most = with_zero(ranges)
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    width = most - least
    beyond = np.stack([np.maximum(low - least, 0.0), np.maximum(most - high, 0.0)])
    cut = np.divide(beyond, width, out=np.zeros_like(beyond), where=width > 0)  # shares of the values
    rounding = np.where(width > 0, step_size(low, high, bits) ** 2 / 12, 0.0)
    return np.asarray((1 - cut.sum(axis=0)) * rounding + (cut * beyond**2).sum(axis=0) / 3)


def group_error(groups: TimeGroups, ranges: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """The (weighted) sum over all steps of the expected squared error of an input."""
    at = groups.group_of_step
    errors = expected_errors(ranges, groups.low[at], groups.high[at], groups.bits)
    return float(errors @ _weights(weights, len(errors)))


def timestep_weights(how: Literal["uniform"] | Schedule | npt.ArrayLike, timesteps: npt.ArrayLike) -> Floats:
    """How much each of `timesteps` (T,) counts in means over time: float64 (T,) with the sum 1.

    `uniform` counts all alike. `snr_linear` and `snr_cosine` count them by the signal-to-noise ratio, up to
    LARGEST_SNR, that images noised by the schedule of that name have there; timesteps are then numbers from 0 to
    TRAINED_STEPS. Anything else is the weights themselves, as many as there are timesteps.
    Raises InvalidConfig where weights are not of this length, negative or all 0, or a timestep is not in the schedule.
    """
    times = np.asarray(timesteps, np.float64)
    if isinstance(how, str):
        weights = np.ones(len(times)) if how == "uniform" else np.minimum(_snr(how, times), LARGEST_SNR)
    else:
        weights = np.asarray(how, np.float64)
    if weights.shape != times.shape or not np.all(np.isfinite(weights) & (weights >= 0)) or not weights.sum() > 0:
        raise InvalidConfig(
            f"timestep_weights are to be {len(times)} numbers, one for each timestep of the calibration, none below "
            f"0 and not all 0; given are {weights.size}, from {weights.min(initial=0):g} to {weights.max(initial=0):g}",
            pointer="/config/timestep_weights",
        )
    return np.asarray(weights / weights.sum())


def _snr(schedule: str, times: Floats) -> Floats:
    if times.min(initial=0) < 0 or times.max(initial=0) > TRAINED_STEPS:
        raise InvalidConfig(
            f"timestep_weights {schedule} is of timesteps from 0 to {TRAINED_STEPS}; the calibration has some from "
            f"{times.min():g} to {times.max():g}: give the weights as numbers, or `uniform`",
            pointer="/config/timestep_weights",
        )
    at = np.minimum(times, TRAINED_STEPS - 1).astype(np.int64)
    kept = np.cumprod(1 - _betas(schedule))[at]
    return np.asarray(kept / (1 - kept))


def _betas(schedule: str) -> Floats:
    if schedule == "snr_linear":  # Ho et al. 2020
        return np.linspace(1e-4, 0.02, TRAINED_STEPS)
    angles = (np.arange(TRAINED_STEPS + 1) / TRAINED_STEPS + 0.008) / 1.008 * np.pi / 2  # Nichol and Dhariwal 2021
    kept = np.cos(angles) ** 2
    return np.asarray(np.minimum(1 - kept[1:] / kept[:-1], 0.999))


def with_zero(ranges: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Both ends (T,) of ranges (T, 2), moved so far that 0 is between them."""
    both = np.asarray(ranges, np.float64)
    return np.minimum(both[:, 0], 0.0), np.maximum(both[:, 1], 0.0)


def _weights(weights: npt.ArrayLike | None, steps: int) -> Floats:
    return np.ones(steps) if weights is None else np.asarray(weights, np.float64)


def _costs(low: Floats, high: Floats, bits: int, weights: Floats) -> Floats:
    """(T + 1, T + 1): the error of the group [a, b), infinite where it would be empty."""
    steps = len(low)
    cost = np.full((steps + 1, steps + 1), np.inf)
    for first in range(steps):
        width = np.maximum.accumulate(high[first:]) - np.minimum.accumulate(low[first:])
        cost[first, first + 1 :] = np.cumsum(weights[first:]) * (width / (2**bits - 1)) ** 2 / 12
    return cost


def _grouped(low: Floats, high: Floats, bounds: npt.NDArray[Any], bits: int) -> TimeGroups:
    starts = bounds[:-1]
    return TimeGroups(bounds, np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts), bits)
