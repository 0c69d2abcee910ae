"""Groups of timesteps: exact, never worse than uniform ones, and smooth where that is asked for."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from service.engine.time_smoothing import grids_at_steps, largest_jump, smoothed
from service.engine.timesteps import (
    LARGEST_SNR,
    TimeGroups,
    expected_errors,
    group_error,
    optimal_groups,
    timestep_weights,
    uniform_groups,
)
from service.errors import InvalidConfig

SHAPED = settings(max_examples=60, deadline=None, print_blob=True)


@st.composite
def ranges(draw: st.DrawFn, most: int = 24) -> np.ndarray:
    """Smallest and largest inputs (T, 2), some of them 0, all of one sign, or the same."""
    steps = draw(st.integers(1, most))
    values = st.floats(-100, 100, width=16) | st.just(0.0)
    return np.sort(draw(arrays.arrays(np.float32, (steps, 2), elements=values)), axis=1)


def growing(steps: int = 50) -> np.ndarray:
    """Ranges as a diffusion model has them: they change slowly, then fast."""
    at = np.linspace(0, 1, steps)
    return np.stack([-1 - 2 * at, 1 + 20 * at**6], axis=1)


def brute_force(limits: np.ndarray, count: int, bits: int, weights: np.ndarray) -> float:
    """The least error of all ways to cut, each measured by the definition."""
    steps, best = len(limits), np.inf
    for cuts in combinations(range(1, steps), count - 1):
        bounds = [0, *cuts, steps]
        error = 0.0
        for first, last in pairwise(bounds):
            part = limits[first:last]
            scale = (max(part[:, 1].max(), 0.0) - min(part[:, 0].min(), 0.0)) / (2**bits - 1)
            error += weights[first:last][part.any(axis=1)].sum() * scale**2 / 12
        best = min(best, error)
    return best


@SHAPED
@given(ranges(most=9), st.integers(1, 9), st.sampled_from([2, 4, 8]), st.data())
def test_optimal_groups_are_the_best_of_all_ways_to_cut(limits: np.ndarray, count: int, bits: int, data: Any) -> None:
    count = min(count, len(limits))
    weights = np.array(data.draw(st.lists(st.floats(0, 9), min_size=len(limits), max_size=len(limits))))
    groups = optimal_groups(limits, count, bits, weights)
    best = brute_force(limits.astype(np.float64), count, bits, weights)
    assert group_error(groups, limits, weights) == pytest.approx(best, rel=1e-9, abs=1e-12)


@SHAPED
@given(ranges(), st.integers(1, 30), st.sampled_from([2, 4, 8]))
def test_optimal_groups_cover_all_steps_and_are_never_worse_than_uniform_ones(
    limits: np.ndarray, count: int, bits: int
) -> None:
    optimal, uniform = optimal_groups(limits, count, bits), uniform_groups(limits, count, bits)
    for groups in (optimal, uniform):
        assert groups.bounds[0] == 0
        assert groups.bounds[-1] == len(limits)
        assert len(groups.low) == len(groups.bounds) - 1 == min(count, len(limits))
        assert (np.diff(groups.bounds) > 0).all()
        assert (groups.low[groups.group_of_step] <= limits[:, 0]).all()
        assert (groups.high[groups.group_of_step] >= limits[:, 1]).all()
    assert np.ptp(np.diff(uniform.bounds)) <= 1
    assert group_error(optimal, limits) <= group_error(uniform, limits) * (1 + 1e-9)


@SHAPED
@given(ranges(), st.sampled_from([2, 4, 8]))
def test_more_groups_never_have_more_error(limits: np.ndarray, bits: int) -> None:
    errors = [group_error(optimal_groups(limits, n, bits), limits) for n in range(1, len(limits) + 1)]
    assert all(more <= fewer * (1 + 1e-9) for fewer, more in pairwise(errors))


def test_cuts_go_where_ranges_change_fast() -> None:
    limits = growing()
    optimal, uniform = optimal_groups(limits, 5, 4), uniform_groups(limits, 5, 4)
    assert np.diff(optimal.bounds)[0] > 15
    assert group_error(optimal, limits) < 0.7 * group_error(uniform, limits)
    assert optimal_groups(limits, 2, 4, np.arange(50) == 0).bounds.tolist()[1] < optimal.bounds[-2]


def test_the_expected_error_is_the_one_of_values_spread_over_the_range(rng: np.random.Generator) -> None:
    limits = np.array([[-1.0, 3.0], [-2.0, 0.5], [0.0, 0.0], [0.0, 2.0]])
    low, high = np.array([-0.6, -2.0, 0.0, 0.0]), np.array([2.8, 0.5, 1.5, 3.0])
    expected = expected_errors(limits, low, high, 4)
    for index, (least, most) in enumerate(limits):
        x = rng.uniform(least, most, 400_000)
        scale = (high[index] - low[index]) / 15
        grid = np.clip(np.rint((x - low[index]) / scale), 0, 15) * scale + low[index]
        # A value beyond the grid is rounded to its end.
        assert np.mean((grid - x) ** 2) == pytest.approx(expected[index], rel=0.02, abs=1e-12)


def test_the_zero_point_stands_for_zero() -> None:
    groups = TimeGroups(np.array([0, 1, 2, 3]), np.array([-1.0, 0.0, 0.0]), np.array([2.0, 3.0, 0.0]), 4)
    assert groups.scale.tolist() == [0.2, 0.2, 1.0]
    assert groups.zero_point.tolist() == [5, 0, 0]


def roughness(groups: TimeGroups) -> float:
    """What the penalty is about."""
    logs = np.log(groups.scale[groups.high > groups.low])
    return float(np.square(np.diff(logs)).sum())


@SHAPED
@given(ranges(), st.integers(1, 12), st.sampled_from([2, 4, 8]))
def test_a_larger_weight_never_makes_scales_rougher(limits: np.ndarray, count: int, bits: int) -> None:
    groups = optimal_groups(limits, count, bits)
    assert smoothed(groups, limits, 0.0) is groups
    weights = [1e-3, 1e-2, 0.1, 1.0, 10.0]
    smooth = [smoothed(groups, limits, weight) for weight in weights]
    rough = [roughness(each) for each in smooth]
    assert all(after <= before + 1e-9 for before, after in pairwise(rough))
    for weight, each in zip(weights, smooth, strict=True):
        np.testing.assert_array_equal(each.bounds, groups.bounds)
        assert (each.low <= groups.low).all()
        assert (each.high >= groups.high).all()
        before, after = group_error(groups, limits), group_error(each, limits)
        assert after >= before * (1 - 1e-9)
        assert after + weight * before * roughness(each) <= before * (1 + weight * roughness(groups)) * (1 + 1e-9)


def test_a_large_weight_makes_all_scales_alike() -> None:
    limits = growing()
    groups = optimal_groups(limits, 8, 4)
    assert largest_jump(groups.scale) > 0.2
    some, all_ = smoothed(groups, limits, 3.0), smoothed(groups, limits, 1e4)
    assert largest_jump(all_.scale) < 0.01
    assert largest_jump(all_.scale) < largest_jump(some.scale) < largest_jump(groups.scale)
    assert group_error(groups, limits) < group_error(some, limits) < group_error(all_, limits)


@pytest.mark.parametrize("interpolation", ["linear", "cubic", "sigmoid"])
def test_steps_beside_a_cut_lie_between_the_groups(interpolation: Any) -> None:
    limits = growing()
    groups = optimal_groups(limits, 5, 4)
    scale, zero = grids_at_steps(groups, 0, interpolation)
    np.testing.assert_allclose(scale, groups.scale[groups.group_of_step])
    np.testing.assert_array_equal(zero, groups.zero_point[groups.group_of_step])
    passing, zeros = grids_at_steps(groups, 3, interpolation)
    assert (np.diff(passing) >= 0).all()  # as the groups' own do
    assert largest_jump(passing) < largest_jump(scale)
    assert (passing != scale).any()
    assert set(zeros) <= set(range(16))
    first = groups.bounds[1]
    assert (passing[: first - 3] == scale[: first - 3]).all()
    middle = np.sqrt(passing[first - 1] * passing[first])
    assert middle == pytest.approx(np.sqrt(groups.scale[0] * groups.scale[1]))


def test_weights_by_schedule_favour_steps_with_little_noise() -> None:
    steps = np.array([999, 500, 100, 0])
    assert timestep_weights("uniform", steps).tolist() == [0.25] * 4
    for schedule in ("snr_linear", "snr_cosine"):
        weights = timestep_weights(schedule, steps)
        assert weights.sum() == pytest.approx(1)
        assert weights[0] < weights[1] < weights[2] == weights[3]  # both above the limit
    # Half of the schedule: what Ho et al. and Nichol and Dhariwal leave of the image.
    for schedule, kept in (("snr_linear", 0.0778), ("snr_cosine", 0.4923)):
        weights = timestep_weights(schedule, steps)
        assert weights[1] / weights[3] == pytest.approx(kept / (1 - kept) / LARGEST_SNR, rel=0.01)
    assert timestep_weights([1, 1, 2, 0], steps).tolist() == [0.25, 0.25, 0.5, 0]


@pytest.mark.parametrize("given_weights", [[1, 2], [1, -1, 1], [0, 0, 0], [1, np.nan, 1], []])
def test_weights_that_weigh_nothing_are_refused(given_weights: list[float]) -> None:
    with pytest.raises(InvalidConfig, match="3 numbers"):
        timestep_weights(given_weights, [1, 2, 3])


def test_timesteps_beyond_the_schedule_have_no_weight_by_it() -> None:
    with pytest.raises(InvalidConfig, match="0 to 1000"):
        timestep_weights("snr_linear", [0, 1200])
