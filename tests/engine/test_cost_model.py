"""What runs cost: the rates come back from runs that follow the formula, and from real ones that can be looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from service.engine.backends.reference import ReferenceBackend
from service.engine.cost_model import Rates, Work, fit
from service.engine.estimate import estimate
from service.engine.formats.registry import open_model
from service.engine.plan import Plan, make_plan
from service.engine.rates import rates
from service.errors import StorageFailure
from tests.engine.helpers import normal, save, specs

BLOCK_BYTES = 1 << 20
RUNS = (
    Work(0, 1, 32_000, 5_000, 0.001),
    Work(0, 64, 2_000_000, 300_000, 0.01),
    Work(64, 0, 500_000, 500_000, 0.0),
    Work(0, 4, 32_000_000, 5_000_000, 0.2),
    Work(4, 0, 32_000_000, 32_000_000, 0.0),
    Work(100, 300, 900_000_000, 150_000_000, 5.0),
)


def plan(source: Path, *formats: str) -> Plan:
    return make_plan(open_model(source), specs(*formats))


@pytest.mark.parametrize(
    "given",
    [
        Rates(0.01, 2e-5, 1e-4, 3e-10, 2e-9),
        Rates(0.0, 2e-5, 5e-5, 0.0, 1e-9),
        Rates(0.02, 0.0, 1e-5, 1e-10, 0.0),
    ],
)
def test_rates_are_found_again_in_runs_that_follow_them(given: Rates) -> None:
    found = fit([(work, given.seconds(work)) for work in RUNS])
    for name in ("run_s", "copied_s", "quantized_s", "read_s", "write_s"):
        assert getattr(found, name) == pytest.approx(getattr(given, name), rel=1e-6, abs=1e-14)


def test_no_rate_is_below_zero_whatever_was_measured() -> None:
    seed = int(np.random.default_rng().integers(1 << 32))
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    for _ in range(200):
        found = fit([(work, random.uniform(0.001, 3)) for work in RUNS])
        assert min(found.run_s, found.copied_s, found.quantized_s, found.read_s, found.write_s) >= 0


def test_rates_of_this_machine_leave_nothing_behind(tmp_path: Path) -> None:
    found = rates(ReferenceBackend(), "compressed-tensors", BLOCK_BYTES, tmp_path)
    assert found.run_s + found.copied_s + found.quantized_s + found.read_s + found.write_s > 0
    assert list(tmp_path.iterdir()) == []


def test_a_larger_model_is_predicted_to_take_longer_and_another_output_no_less(tmp_path: Path) -> None:
    backend = ReferenceBackend()
    sources = [
        save(tmp_path / f"{count}.safetensors", {f"l.{i}.weight": normal(128, 512, seed=i) for i in range(count)})
        for count in (2, 40)
    ]
    both = ("compressed-tensors", "parquet")
    asked = [plan(sources[0], both[0]), plan(sources[1], both[0]), plan(sources[1], *both)]
    small, large, twice = (estimate(one, backend, BLOCK_BYTES, tmp_path).seconds for one in asked)
    assert 0 < small < large <= twice


def test_a_plan_can_be_had_where_nothing_can_be_written(tmp_path: Path) -> None:
    gone, backend = tmp_path / "gone", ReferenceBackend()
    with pytest.raises(StorageFailure):
        rates(backend, "parquet", BLOCK_BYTES, gone)
    source = save(tmp_path / "m.safetensors", {"l.weight": normal(128, 512)})
    assert estimate(plan(source, "parquet"), backend, BLOCK_BYTES, gone).seconds > 0
