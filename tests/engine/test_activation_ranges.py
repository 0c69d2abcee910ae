"""Ends of activation grids: short of rare inputs where levels are few, and close to the best that there is."""

from __future__ import annotations

import numpy as np
import pytest

from service.engine.activation_ranges import CLIPS, clipped_ranges


def error(x: np.ndarray, low: float, high: float, bits: int) -> float:
    """The mean squared error of x on the grid from low to high."""
    scale = (high - low) / (2**bits - 1)
    return float(np.mean((np.clip(np.rint((x - low) / scale), 0, 2**bits - 1) * scale + low - x) ** 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("is_one_sided", [False, True], ids=["both sides", "one side"])
def test_no_other_clip_has_much_less_error(rng: np.random.Generator, bits: int, is_one_sided: bool) -> None:
    spread = rng.uniform(0.2, 3, 32)  # of the columns
    x = rng.laplace(0, spread, (4000, 32))
    if is_one_sided:
        x = np.maximum(x, -0.1)
    low, high = x.min(), x.max()
    [found] = clipped_ranges([[low, high]], np.square(x).mean(axis=0)[None], bits)
    best = min(error(x, low * a, high * b, bits) for a in CLIPS for b in CLIPS)
    assert low <= found[0] <= 0 <= found[1] <= high
    # What is rounded is not spread evenly over a step any more where steps are as wide as columns.
    assert error(x, *found, bits) < 1.35 * best


def test_the_fewer_levels_the_more_is_cut_off(rng: np.random.Generator) -> None:
    x = rng.laplace(0, 1, (5000, 8))
    limits, square = [[x.min(), x.max()]], np.square(x).mean(axis=0)[None]
    widths = [np.ptp(clipped_ranges(limits, square, bits)) for bits in (2, 3, 4, 6, 8)]
    assert widths == sorted(widths)
    assert 2 * widths[0] < widths[-1] <= np.ptp(limits)


def test_nothing_is_cut_off_where_all_is_of_one_size_or_nothing_is_fed() -> None:
    limits = np.array([[0.0, 0.0], [0.0, 3.0], [-3.0, 3.0]])
    square = np.array([[0.0, 0.0], [9.0, 9.0], [9.0, 9.0]])
    np.testing.assert_array_equal(clipped_ranges(limits, square, 8), limits)
