"""Schemes for an output under its target: of all choices the one of least error, and the curve that it lies on.

What is added up is the squared relative error of each tensor: to the first order a model's loss grows with it, layer
by layer (the linearity theorem of HIGGS, Malinovskii et al. 2024), while absolute errors of layers of different scale
cannot be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from service.engine.allocation import Option, allocate, frontier, smallest_size
from service.engine.backends.base import Backend
from service.engine.formats.base import ModelReader
from service.engine.fused import fused_layer
from service.engine.metrics import ErrorSums
from service.engine.plan import (
    Decision,
    OutputPlan,
    Plan,
    TensorPlan,
    choices,
    stored_bytes,
)
from service.engine.progress import Cancelled, Report
from service.engine.report import Budget, BudgetPoint
from service.engine.sensitivity import Sensitivities, measure, way_key
from service.errors import InvalidConfig

#: Points of a curve at most, its ends and the chosen one among them.
CURVE_POINTS = 33


def within_budgets(
    plan: Plan, reader: ModelReader, *, backend: Backend, memo: Path | None, report: Report, cancelled: Cancelled
) -> Plan:
    """The plan with the choice of least error under its target where a width is `auto`; that reads weights.

    `memo` is where what was measured is kept for another try. Raises what `measure` raises, and InvalidConfig when a
    target is out of reach.
    """
    if not any(output.config.is_auto for output in plan.outputs):
        return plan
    seen = measure(plan, reader, backend=backend, memo=memo, report=report, cancelled=cancelled)
    decided = [_decided(plan, index, seen) for index in range(len(plan.outputs))]
    tensors = tuple(
        TensorPlan(tensor.info, tuple(decisions[place] for decisions, _ in decided), tensor.tells)
        for place, tensor in enumerate(plan.tensors)
    )
    return replace(plan, tensors=tensors, budgets=tuple(budget for _, budget in decided))


@dataclass(frozen=True, slots=True)
class _Item:
    """Tensors that are stored alike, by their places in the plan, and what they may choose from.

    Of each option there is a decision for each tensor.
    """

    places: tuple[int, ...]
    options: tuple[tuple[Decision, ...], ...]
    costs: tuple[Option, ...]


def _decided(plan: Plan, output: int, seen: Sensitivities) -> tuple[list[Decision], Budget | None]:
    """A decision for every tensor of an output."""
    decisions = [tensor.decisions[output] for tensor in plan.tensors]
    about = plan.outputs[output]
    if not about.config.is_auto:
        return decisions, None
    items = _items(plan, about, seen)
    costs = [item.costs for item in items]
    free = [place for item in items for place in item.places]
    fixed = _Fixed.of(plan, about, decisions, set(free))
    budget = fixed.room(about)
    if smallest_size(costs) > budget:
        raise _out_of_reach(about, fixed, costs)
    found = allocate(costs, budget)

    def point(chosen: Sequence[int]) -> BudgetPoint:
        return _point(items, chosen, fixed)

    for item, choice in zip(items, found.choices, strict=True):
        for place, decision in zip(item.places, item.options[choice], strict=True):
            decisions[place] = replace(decision, rule=f"{decision.rule}; {_scheme(decision)} under {_target(about)}")
    corners = frontier(costs)
    step = max(1, -(-len(corners) // (CURVE_POINTS - 2)))
    chosen = point(found.choices)
    curve = {p.size_bytes: p for p in (point(c.choices) for c in (*corners[::step], corners[-1]))} | {
        chosen.size_bytes: chosen
    }
    return decisions, Budget(chosen, found.is_exact, tuple(curve[size] for size in sorted(curve)))


def _items(plan: Plan, output: OutputPlan, seen: Sensitivities) -> list[_Item]:
    groups: dict[str, list[tuple[int, dict[str, Decision]]]] = {}
    for place, tensor in enumerate(plan.tensors):
        options = _admissible(choices(tensor.info, output, tensor.tells), output, seen.get(tensor.info.name, {}))
        if len(options) > 1:
            name = fused_layer(tensor.info.name) if output.format.fuses else tensor.info.name
            groups.setdefault(name, []).append((place, options))
    items = []
    for members in groups.values():
        common = [id_ for id_ in members[0][1] if all(id_ in options for _, options in members)]
        # Without one that all may have they cannot be stored alike.
        for together in [members] if common else [[member] for member in members]:
            ids = common or list(together[0][1])
            items.append(
                _item(plan, output, [(place, [options[id_] for id_ in ids]) for place, options in together], seen)
            )
    return items


def _admissible(
    options: Sequence[Decision], output: OutputPlan, errors: Mapping[str, ErrorSums]
) -> dict[str, Decision]:
    """By scheme, those that reach `min_accuracy` as far as was seen; the largest where none does, to fall back from."""
    if len(options) < 2:
        return {}
    floor = 0.0 if output.config.on_failure == "warn" else output.config.min_accuracy or 0.0
    good = [o for o in options if (e := errors[way_key(o)]).accuracy >= floor and e.keeps_magnitude]
    return {_scheme(option): option for option in (good if len(good) > 1 else options[-2:])}


def _item(
    plan: Plan, output: OutputPlan, members: Sequence[tuple[int, Sequence[Decision]]], seen: Sensitivities
) -> _Item:
    options = tuple(zip(*(decisions for _, decisions in members), strict=True))
    infos = [plan.tensors[place].info for place, _ in members]
    costs = tuple(
        Option(
            sum(stored_bytes(info, d, output) for info, d in zip(infos, decisions, strict=True)),
            sum(_loss(seen[info.name][way_key(d)]) for info, d in zip(infos, decisions, strict=True)),
        )
        for decisions in options
    )
    return _Item(tuple(place for place, _ in members), options, costs)


def _loss(errors: ErrorSums) -> float:
    """The squared relative error, of the layer's output where that was measured; 0 for weights that are not finite."""
    if errors.has_output:
        return errors.out_dd / errors.out_xx
    # Of weights that are not finite the run itself tells.
    return errors.sum_dd / errors.sum_xx if errors.finite and errors.sum_xx else 0.0


def _scheme(decision: Decision) -> str:
    assert decision.scheme is not None, "only what is quantized has a choice"
    return decision.scheme.id


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What an output holds beside the tensors that have a choice: bytes, and weights that are quantized."""

    quantized_bytes: int
    quantized_weights: int
    copied_bytes: int
    free_weights: int

    @classmethod
    def of(cls, plan: Plan, output: OutputPlan, decisions: Sequence[Decision], free: set[int]) -> _Fixed:
        """Of the tensors at all places that are not `free`."""
        pairs = [(tensor.info, decision) for tensor, decision in zip(plan.tensors, decisions, strict=True)]
        rest = [pair for place, pair in enumerate(pairs) if place not in free]
        return cls(
            sum(stored_bytes(info, d, output) for info, d in rest if d.scheme),
            sum(info.size for info, d in rest if d.scheme),
            sum(info.nbytes for info, d in rest if not d.scheme),
            sum(plan.tensors[place].info.size for place in free),
        )

    @property
    def weights(self) -> int:
        """All that are quantized."""
        return self.quantized_weights + self.free_weights

    def room(self, output: OutputPlan) -> int:
        """Bytes that the target leaves."""
        if (bits := output.config.target_bits_per_weight) is not None:
            return int(bits * self.weights / 8) - self.quantized_bytes
        assert output.config.target_size_bytes is not None, "`auto` has a target"
        return output.config.target_size_bytes - self.quantized_bytes - self.copied_bytes


def _point(items: Sequence[_Item], chosen: Sequence[int], fixed: _Fixed) -> BudgetPoint:
    taken = [(item, item.costs[choice], item.options[choice]) for item, choice in zip(items, chosen, strict=True)]
    size = sum(option.size for _, option, _ in taken) + fixed.quantized_bytes
    tensors = sum(len(item.places) for item, _, _ in taken)
    return BudgetPoint(
        bits_per_weight=8 * size / max(1, fixed.weights),
        size_bytes=size + fixed.copied_bytes,
        relative_error=(max(0.0, sum(option.cost for _, option, _ in taken)) / max(1, tensors)) ** 0.5,
        schemes=dict(sorted(Counter(_scheme(d) for _, _, decisions in taken for d in decisions).items())),
    )


def _target(output: OutputPlan) -> str:
    config = output.config
    if config.target_bits_per_weight is not None:
        return f"target_bits_per_weight {config.target_bits_per_weight:g}"
    return f"target_size_bytes {config.target_size_bytes}"


def _out_of_reach(output: OutputPlan, fixed: _Fixed, costs: Sequence[Sequence[Option]]) -> InvalidConfig:
    size = smallest_size(costs) + fixed.quantized_bytes
    if output.config.target_bits_per_weight is not None:
        least, name = f"{8 * size / max(1, fixed.weights):.3f} bits per weight", "target_bits_per_weight"
    else:
        least, name = f"{size + fixed.copied_bytes} bytes", "target_size_bytes"
    return InvalidConfig(
        f"output {output.name}: {_target(output)} is out of reach, {least} is the least: raise the target, allow"
        " smaller `candidates` or larger groups, lower `min_accuracy`, or let `layers` and `skip` name fewer tensors",
        pointer=f"/config/{name}",
    )
