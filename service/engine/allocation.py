"""Which of its options each item takes, for the least cost within a budget: the multiple-choice knapsack.

The path along the lower convex hulls of all items (Sinha & Zoltners 1979) solves the relaxed problem and bounds the
true one. Behind it, all choices that no other beats in both size and cost are carried on item by item, less those whose
bound is above the best that is known: what is left at the end is the optimum (Pisinger 1995). Where they become too
many the ones of the lowest bounds go on, and the result says how far from the optimum it may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

#: Choices that are carried on from one item to the next at most.
MOST_STATES = 1 << 16
#: Costs that differ by less than this share are the same: sums of float64 depend on their order.
TOLERANCE = 1e-12

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Option:
    """One way for an item: its size in whole units, and what it costs; neither is negative."""

    size: int
    cost: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """An option of each item.

    choices  the index of each item's option
    size     of all together
    cost     of all together
    bound    no choice within the budget costs less
    """

    choices: tuple[int, ...]
    size: int
    cost: float
    bound: float

    @property
    def is_exact(self) -> bool:
        """Whether it is known to be the optimum."""
        return self.cost <= self.bound + TOLERANCE * max(1.0, abs(self.bound))


@dataclass(frozen=True, slots=True)
class Point:
    """What is optimal at one size."""

    choices: tuple[int, ...]
    size: int
    cost: float


@dataclass(frozen=True, slots=True)
class _Step:
    """From one corner of an item's hull to the next, larger and cheaper one."""

    item: int
    option: int
    size: int
    gain: float

    @property
    def slope(self) -> float:
        return self.gain / self.size


def smallest_size(items: Sequence[Sequence[Option]]) -> int:
    """The budget below which there is no choice."""
    return sum(min(option.size for option in options) for options in items)


def allocate(items: Sequence[Sequence[Option]], budget: int) -> Allocation:
    """The choice of least cost whose sizes add up to no more than `budget`.

    Raises ValueError where the smallest options are larger together, or an item has none.
    """
    if smallest_size(items) > budget:
        raise ValueError(f"the smallest options have a size of {smallest_size(items)}, the budget is {budget}")
    corners = [_hull(options) for options in items]
    steps = _steps(items, corners)
    start = [hull[0] for hull in corners]
    known = _along(items, start, steps, budget)
    bound = _relaxed(items, start, steps, budget)
    if _cost(items, known) <= bound + TOLERANCE * max(1.0, abs(bound)):
        return Allocation(tuple(known), _size(items, known), _cost(items, known), bound)
    found, is_complete = _search(items, corners, steps, budget, _cost(items, known))
    best = known if found is None else found
    cost = _cost(items, best)
    return Allocation(tuple(best), _size(items, best), cost, cost if is_complete else min(bound, cost))


def frontier(items: Sequence[Sequence[Option]]) -> list[Point]:
    """What is optimal at the sizes of the relaxed problem's corners, from the smallest to the cheapest choice."""
    corners = [_hull(options) for options in items]
    chosen = [hull[0] for hull in corners]
    points = [Point(tuple(chosen), _size(items, chosen), _cost(items, chosen))]
    for step in _steps(items, corners):
        chosen[step.item] = step.option
        points.append(Point(tuple(chosen), points[-1].size + step.size, points[-1].cost - step.gain))
    return points


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull, from the smallest option to the cheapest."""
    order = sorted(range(len(options)), key=lambda index: (options[index].size, options[index].cost, index))
    hull: list[int] = []
    for index in order:
        option = options[index]
        if hull and option.cost >= options[hull[-1]].cost:
            continue
        while hull and (
            options[hull[-1]].size == option.size
            or (len(hull) > 1 and _slope(options, hull[-2], hull[-1]) <= _slope(options, hull[-2], index))
        ):
            hull.pop()
        hull.append(index)
    return hull


def _slope(options: Sequence[Option], first: int, second: int) -> float:
    return (options[first].cost - options[second].cost) / (options[second].size - options[first].size)


def _steps(items: Sequence[Sequence[Option]], corners: Sequence[Sequence[int]]) -> list[_Step]:
    """All steps, the steepest first; of one item they are in order by themselves, for its hull is convex."""
    steps = [
        _Step(item, after, items[item][after].size - items[item][before].size,
              items[item][before].cost - items[item][after].cost)
        for item, hull in enumerate(corners)
        for before, after in pairwise(hull)
    ]  # fmt: skip
    return sorted(steps, key=lambda step: -step.slope)


def _along(items: Sequence[Sequence[Option]], start: Sequence[int], steps: Sequence[_Step], budget: int) -> list[int]:
    """A good choice: every step that fits, the steepest first."""
    chosen, size = list(start), _size(items, start)
    left_out: set[int] = set()
    for step in steps:
        if step.item not in left_out and size + step.size <= budget:
            chosen[step.item] = step.option
            size += step.size
        else:
            left_out.add(step.item)
    return chosen


def _relaxed(items: Sequence[Sequence[Option]], start: Sequence[int], steps: Sequence[_Step], budget: int) -> float:
    """The least cost where a step may be taken in part."""
    left, cost = budget - _size(items, start), _cost(items, start)
    for step in steps:
        share = min(1.0, left / step.size)
        cost -= share * step.gain
        left -= step.size
        if left <= 0:
            break
    return cost


class _Bounds:
    """For each number of items that are decided: what the others cost at least with so much left."""

    def __init__(self, items: Sequence[Sequence[Option]], corners: Sequence[Sequence[int]], steps: list[_Step]) -> None:
        """Of `items` in the order in which they are decided."""
        self._items = np.array([step.item for step in steps], np.int64)
        self._sizes = np.array([step.size for step in steps], np.int64)
        self._gains = np.array([step.gain for step in steps])
        starts = [options[hull[0]] for options, hull in zip(items, corners, strict=True)]
        self._start_sizes = np.array([option.size for option in starts], np.int64)
        self._start_costs = np.array([option.cost for option in starts])

    def of(self, decided: int, left: Ints) -> Floats:
        """Costs for each of `left`; infinite where the smallest options no longer fit."""
        rest = self._items >= decided
        sizes = np.cumsum(np.concatenate(([self._start_sizes[decided:].sum()], self._sizes[rest])))
        costs = np.cumsum(np.concatenate(([self._start_costs[decided:].sum()], -self._gains[rest])))
        return np.where(left < sizes[0], np.inf, np.interp(left, sizes, costs))


def _search(
    items: Sequence[Sequence[Option]],
    corners: Sequence[Sequence[int]],
    steps: Sequence[_Step],
    budget: int,
    known: float,
) -> tuple[list[int] | None, bool]:
    """A choice that costs less than `known`, if there is one, and whether none can have been overlooked."""
    # Large items first: what is left for the small ones then decides little.
    order = sorted(range(len(items)), key=lambda item: -max(option.size for option in items[item]))
    place = {item: index for index, item in enumerate(order)}
    ordered = [items[item] for item in order]
    moved = [_Step(place[step.item], step.option, step.size, step.gain) for step in steps]
    bounds = _Bounds(ordered, [corners[item] for item in order], moved)
    limit = known - TOLERANCE * max(1.0, abs(known))
    sizes, costs, is_complete = np.zeros(1, np.int64), np.zeros(1), True
    trail: list[tuple[Ints, Ints]] = []  # of each item: the state that it was added to, and its option
    for index, options in enumerate(ordered):
        grown = sizes[:, None] + np.array([option.size for option in options], np.int64)
        dearer = costs[:, None] + np.array([option.cost for option in options])
        low = dearer + bounds.of(index + 1, (budget - grown).ravel()).reshape(grown.shape)
        kept = _undominated(grown.ravel(), dearer.ravel(), np.flatnonzero(low.ravel() < limit))
        if len(kept) > MOST_STATES:
            kept = kept[np.sort(np.argsort(low.ravel()[kept], kind="stable")[:MOST_STATES])]
            is_complete = False
        if not len(kept):
            return None, is_complete
        sizes, costs = grown.ravel()[kept], dearer.ravel()[kept]
        trail.append((kept // len(options), kept % len(options)))
    chosen = [0] * len(items)
    state = int(np.argmin(costs))
    for index in range(len(items) - 1, -1, -1):
        before, option = trail[index]
        chosen[order[index]] = int(option[state])
        state = int(before[state])
    return chosen, is_complete


def _undominated(sizes: Ints, costs: Floats, among: Ints) -> Ints:
    """Of the indices `among` those for which no other one is as small and as cheap, the smallest first."""
    order = among[np.lexsort((costs[among], sizes[among]))]
    if not len(order):
        return order
    sorted_costs = costs[order]
    cheapest = np.minimum.accumulate(sorted_costs)
    is_new = np.concatenate(([True], sorted_costs[1:] < cheapest[:-1]))
    return order[is_new]


def _size(items: Sequence[Sequence[Option]], chosen: Sequence[int]) -> int:
    return sum(options[index].size for options, index in zip(items, chosen, strict=True))


def _cost(items: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(options[index].cost for options, index in zip(items, chosen, strict=True))
