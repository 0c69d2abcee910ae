"""The choice of least cost within a budget, held to all choices that there are."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.allocation import Option, allocate, frontier, smallest_size

OPTIONS = st.builds(Option, st.integers(0, 40), st.integers(0, 64).map(lambda n: n / 64))
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=5), max_size=5)


def least(items: list[list[Option]], budget: int) -> float:
    """By trying all."""
    return min(sum(o.cost for o in c) for c in product(*items) if sum(o.size for o in c) <= budget)


@given(ITEMS, st.integers(0, 120))
def test_no_choice_within_the_budget_costs_less(items: list[list[Option]], room: int) -> None:
    budget = smallest_size(items) + room
    found = allocate(items, budget)
    chosen = [options[index] for options, index in zip(items, found.choices, strict=True)]
    assert sum(o.size for o in chosen) == found.size <= budget
    assert sum(o.cost for o in chosen) == pytest.approx(found.cost)
    assert found.cost == pytest.approx(least(items, budget))
    assert found.is_exact


@given(ITEMS)
def test_every_corner_of_the_frontier_is_optimal_at_its_size(items: list[list[Option]]) -> None:
    points = frontier(items)
    assert points[0].size == smallest_size(items)
    assert points[-1].cost == pytest.approx(least(items, 10**9))
    for before, after in pairwise(points):
        assert (before.size, after.cost) < (after.size, before.cost)
    for point in points:
        assert point.cost == pytest.approx(least(items, point.size))


def layers(count: int, seed: int) -> list[list[Option]]:
    """As a model has them: some shapes, errors that fall by about four with each bit."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 64, 8) * 4096 * 64
    return [
        [
            Option(int(size * (bits + 0.25) / 8), float(scale * 4.0**-bits * (1 + 0.1 * rng.random())))
            for bits in (2, 3, 4, 5, 6, 8)
        ]
        for size, scale in zip(rng.choice(sizes, count), rng.lognormal(size=count), strict=True)
    ]


@pytest.mark.parametrize("bits", [2.4, 3.3, 4.7])
def test_a_large_model_is_within_one_layers_step_of_the_bound(bits: float) -> None:
    seed = 7
    print(f"seed {seed}")
    items = layers(600, seed)
    budget = int(sum(options[-1].size for options in items) / 8.25 * bits)
    found = allocate(items, budget)
    step = max(a.cost - b.cost for options in items for a, b in pairwise(options))
    corner = max((point for point in frontier(items) if point.size <= budget), key=lambda point: point.size)
    assert found.size <= budget
    assert found.bound <= found.cost <= min(corner.cost, found.bound + step)


def test_a_budget_below_the_smallest_options_is_refused() -> None:
    with pytest.raises(ValueError, match="the smallest options have a size of 7"):
        allocate([[Option(3, 1.0), Option(9, 0.0)], [Option(4, 0.5)]], 6)
