"""Schemes that are chosen under a target, on real weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine.backends.cpu import CpuBackend
from service.engine.budget import within_budgets
from service.engine.formats.registry import open_model
from service.engine.metrics import ErrorSums
from service.engine.pipeline import quantize
from service.engine.plan import Plan, choices, make_plan, stored_bytes
from service.engine.progress import Happening, Progress
from service.engine.report import RunReport
from service.engine.sensitivity import MEASURED, SAMPLE_ELEMENTS, way_key
from service.errors import Cancelled, InvalidConfig
from tests.engine.helpers import save, specs

BACKEND = CpuBackend()
FORMATS = ("parquet", "compressed-tensors")


def weights(*shape: int, tail: float, seed: int) -> np.ndarray:
    """Student's t: the smaller `tail`, the harder to quantize."""
    return (np.random.default_rng(seed).standard_t(tail, shape) * 0.05).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers of different size and difficulty, one of them with rows that end in a short group."""
    tensors = {
        "a.q_proj.weight": weights(128, 128, tail=30, seed=1),
        "a.k_proj.weight": weights(32, 128, tail=2, seed=2),
        "a.out.weight": weights(96, 256, tail=4, seed=3),
        "b.fc.weight": weights(130, 144, tail=3, seed=4),
        "b.out.weight": weights(256, 64, tail=8, seed=5),
        "norm.weight": np.ones(64, np.float32),
    }
    return save(tmp_path_factory.mktemp("budget") / "model.safetensors", tensors)


def planned(
    source: Path,
    *formats: str,
    memo: Path | None = None,
    seen: list[Happening] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    **config: Any,
) -> Plan:
    """The plan of a job with one output for each format."""
    outputs = specs(*formats, **({"bit_width": "auto", "min_accuracy": 0.0, "group_size": 32} | config))
    happenings = seen if seen is not None else []
    reader = open_model(source)
    try:
        plan = make_plan(reader, outputs)
        return within_budgets(plan, reader, backend=BACKEND, memo=memo, report=happenings.append, cancelled=cancelled)
    finally:
        reader.close()


def made(source: Path, work: Path, plan: Plan) -> RunReport:
    """The outputs of the plan."""
    reader = open_model(source)
    try:
        return quantize(
            plan, reader, work, backend=BACKEND, block_bytes=1 << 20, report=lambda _: None, cancelled=lambda: False
        )
    finally:
        reader.close()


def schemes_of(plan: Plan, output: int = 0) -> dict[str, str]:
    """By tensor."""
    chosen = {t.info.name: t.decisions[output].scheme for t in plan.tensors}
    return {name: scheme.id for name, scheme in chosen.items() if scheme}


@pytest.mark.parametrize("format_id", FORMATS)
@pytest.mark.parametrize("target", [3.2, 4.5, 6.1])
def test_a_target_of_bits_is_kept_and_nearly_reached_in_what_is_written(
    model: Path, tmp_path: Path, format_id: str, target: float
) -> None:
    plan = planned(model, format_id, target_bits_per_weight=target)
    [output] = made(model, tmp_path, plan).outputs
    assert target - 0.6 < output.quality.bits_per_weight <= target
    assert output.budget is not None
    assert output.quality.bits_per_weight == pytest.approx(output.budget.chosen.bits_per_weight)
    assert sum(t.stored_bytes for t in output.tensors) == output.budget.chosen.size_bytes
    assert RunReport.from_json(json.loads(json.dumps(made(model, tmp_path / "b", plan).to_json()))).outputs[0].budget


def test_a_target_of_bytes_counts_what_is_copied_too(model: Path, tmp_path: Path) -> None:
    target = 48_000
    [output] = made(model, tmp_path, planned(model, "parquet", target_size_bytes=target)).outputs
    assert target * 0.95 < sum(t.stored_bytes for t in output.tensors) <= target


def test_no_other_choice_of_schemes_has_less_error(model: Path, tmp_path: Path) -> None:
    memo = tmp_path / MEASURED
    plan = planned(model, "parquet", memo=memo, target_bits_per_weight=4.4, candidates=["int2", "int4", "int8"])
    assert plan.budgets[0] is not None
    measured = dict(map(json.loads, memo.read_text().splitlines()[1:]))
    tensors = [t for t in plan.tensors if t.decisions[0].scheme]
    options = []
    for tensor in tensors:
        each = choices(tensor.info, plan.outputs[0])
        losses = [ErrorSums(*measured[tensor.info.name][way_key(d)]).relative_error ** 2 for d in each]
        options.append([(stored_bytes(tensor.info, d, plan.outputs[0]), e) for d, e in zip(each, losses, strict=True)])
    budget = 4.4 * sum(t.info.size for t in tensors) / 8
    least = min(sum(e for _, e in c) for c in product(*options) if sum(s for s, _ in c) <= budget)
    assert plan.budgets[0].chosen.relative_error == pytest.approx((least / len(tensors)) ** 0.5)
    assert plan.budgets[0].is_exact
    assert len(set(schemes_of(plan).values())) > 1


def test_the_curve_falls_from_the_smallest_choice_to_the_largest(model: Path) -> None:
    [budget] = planned(model, "parquet", target_bits_per_weight=4.0).budgets
    assert budget is not None
    assert budget.chosen in budget.curve
    assert budget.curve[0].schemes == {"int2": 5}
    assert budget.curve[-1].schemes == {"int8": 5}
    sizes = [p.size_bytes for p in budget.curve]
    errors = [p.relative_error for p in budget.curve]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


def test_layers_that_a_runtime_stacks_are_stored_alike_where_it_reads_the_format(model: Path) -> None:
    plan = planned(model, *FORMATS, target_bits_per_weight=4.0)
    parquet, stacked = schemes_of(plan, 0), schemes_of(plan, 1)
    # One is much smaller than the other, and more bits for it cost little: on their own they differ.
    assert parquet["a.q_proj.weight"] != parquet["a.k_proj.weight"]
    assert stacked["a.q_proj.weight"] == stacked["a.k_proj.weight"]


def test_an_override_fixes_a_tensor_and_the_others_make_room_for_it(model: Path) -> None:
    layers = [{"match": "a.out.*", "bit_width": 8}]
    plan = planned(model, "parquet", target_bits_per_weight=5.0, layers=layers)
    assert schemes_of(plan)["a.out.weight"] == "int8"
    assert plan.budgets[0] is not None
    assert plan.budgets[0].chosen.bits_per_weight <= 5.0


def test_a_scheme_that_misses_min_accuracy_is_not_chosen(model: Path, tmp_path: Path) -> None:
    plan = planned(model, "parquet", target_bits_per_weight=5.5, min_accuracy=0.99)
    report = made(model, tmp_path, plan)
    assert report.passed
    assert not report.warnings
    loose = planned(model, "parquet", target_bits_per_weight=3.0, min_accuracy=0.0)
    assert "int2" in schemes_of(loose).values()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"target_bits_per_weight": 1.5}, "bits per weight is the least"),
        ({"target_size_bytes": 100}, "bytes is the least"),
    ],
)
def test_a_target_out_of_reach_is_refused_with_the_least_that_can_be(
    model: Path, target: dict[str, float], words: str
) -> None:
    with pytest.raises(InvalidConfig, match=words) as error:
        planned(model, "parquet", **target)
    assert error.value.pointer == f"/config/{next(iter(target))}"


def test_what_was_measured_before_a_stop_is_not_measured_again(model: Path, tmp_path: Path) -> None:
    memo = tmp_path / MEASURED
    told: list[Happening] = []

    def after_two() -> bool:
        return sum(isinstance(h, Progress) for h in told) >= 2

    with pytest.raises(Cancelled):
        planned(model, "parquet", memo=memo, seen=told, cancelled=after_two, target_bits_per_weight=4.0)
    kept = memo.read_bytes()
    assert len(kept.splitlines()) == 3
    memo.write_bytes(kept + b'["cut off by a cra')
    plan = planned(model, "parquet", memo=memo, target_bits_per_weight=4.0)
    assert memo.read_bytes().startswith(kept)
    assert plan.tensors == planned(model, "parquet", target_bits_per_weight=4.0).tensors
    # What is kept of the same model is believed: were the second layer as good at 2 bits as at 8, it would have 2.
    lines = [json.loads(line) for line in memo.read_text().splitlines()]
    lines[2][1] = {key: [4096, 1.0, 1.0, 1.0, 0.0, 0.0, True, 0.0, 0.0, 0.0, 0.0] for key in lines[2][1]}
    memo.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert schemes_of(planned(model, "parquet", memo=memo, target_bits_per_weight=4.0))[lines[2][0]] == "int2"


def test_a_large_tensor_is_judged_by_rows_spread_over_it(tmp_path: Path) -> None:
    rows = 8 * SAMPLE_ELEMENTS // 512
    # Two bits hold the one exactly, and the other but for the rows in its middle.
    easy = (np.random.default_rng(1).integers(-1, 3, (rows, 512)) * 0.05).astype(np.float32)
    hard = easy.copy()
    hard[rows // 3 : rows // 2] = weights(rows // 2 - rows // 3, 512, tail=30, seed=2)
    source = save(tmp_path / "model.safetensors", {"easy.weight": easy, "hard.weight": hard})
    chosen = schemes_of(planned(source, "parquet", target_bits_per_weight=4.9))
    assert (chosen["easy.weight"], chosen["hard.weight"]) == ("int2", "int6")
