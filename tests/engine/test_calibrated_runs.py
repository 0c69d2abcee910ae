"""Runs with calibration: what methods make of it, what decides, and what is told."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from service.engine.backends.base import Backend
from service.engine.backends.cpu import CpuBackend
from service.engine.backends.reference import ReferenceBackend
from service.engine.calibration.opening import open_calibration
from service.engine.choice import choose_method
from service.engine.formats.registry import open_model
from service.engine.memory_need import need_to_quantize
from service.engine.plan import make_plan
from service.engine.progress import Happening, Notice, TensorCompleted
from service.engine.report import OutputReport, TensorReport
from service.errors import Cancelled, InvalidCalibration, InvalidConfig
from tests.engine.calibrations import gram, samples, save_safetensors
from tests.engine.helpers import normal, run, save, specs

FED = {"a": samples(300, 128, seed=5), "b": samples(300, 96, seed=6)}
BACKENDS = pytest.mark.parametrize("backend", [ReferenceBackend(), CpuBackend()], ids=lambda b: b.id)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {"a.weight": normal(64, 128, seed=1), "a.bias": normal(64), "b.weight": normal(80, 96, seed=2)}
    return save(tmp_path / "m.safetensors", tensors)


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    return save_safetensors(tmp_path / "c.safetensors", {f"{name}.gram": gram(fed) for name, fed in FED.items()})


def of(output: OutputReport, name: str) -> TensorReport:
    """One tensor's."""
    return next(t for t in output.tensors if t.name == name)


def read(folder: Path, name: str) -> np.ndarray:
    """A tensor as it is stored."""
    with closing(open_model(folder)) as reader:
        info = reader.find(name)
        assert info is not None
        return reader.rows(info, 0, info.rows).astype(np.float64)


def codes(happenings: list[Happening]) -> list[str]:
    """Of all that was warned of."""
    return [h.code for h in happenings if isinstance(h, Notice)]


@BACKENDS
@pytest.mark.parametrize("method", ["minmax", "mse", "awq"])
def test_the_reported_output_error_is_that_of_running_the_layers(
    backend: Backend, method: str, model: Path, calibration: Path, tmp_path: Path
) -> None:
    report = run(model, tmp_path / "work", specs("parquet", method=method), backend=backend, calibration=calibration)
    totals = [0.0, 0.0]
    for name, fed in FED.items():
        before = fed.astype(np.float64) @ read(model, f"{name}.weight").T
        lost = fed.astype(np.float64) @ read(tmp_path / "work" / "parquet", f"{name}.weight").T - before
        expected = np.linalg.norm(lost) / np.linalg.norm(before)
        row = of(report.outputs[0], f"{name}.weight").row()
        assert row["output_relative_error"] == pytest.approx(expected, rel=1e-4)
        assert row["output_sqnr_db"] == pytest.approx(-20 * np.log10(expected), rel=1e-4)
        totals = [totals[0] + (lost**2).sum(), totals[1] + (before**2).sum()]
    summary = report.outputs[0].summary()
    assert summary["output_relative_error"] == pytest.approx(np.sqrt(totals[0] / totals[1]), rel=1e-4)
    assert OutputReport.from_json(report.outputs[0].to_json()) == report.outputs[0]


@BACKENDS
def test_calibrated_mse_loses_less_of_the_output_than_mse_and_that_less_than_minmax(
    backend: Backend, model: Path, tmp_path: Path
) -> None:
    weighted = save_safetensors(
        tmp_path / "w.safetensors", {f"{n}.mean_square": (fed**2).mean(0)[None] for n, fed in FED.items()}
    )
    lost = {}
    for name, method, given in (("minmax", "minmax", None), ("mse", "mse", None), ("weighted", "mse", weighted)):
        outputs = specs("parquet", method=method, bit_width=3, group_size=32)
        run(model, tmp_path / name, outputs, backend=backend, calibration=given)
        lost[name] = sum(
            np.linalg.norm(fed @ (read(tmp_path / name / "parquet", f"{n}.weight") - read(model, f"{n}.weight")).T) ** 2
            for n, fed in FED.items()
        )
    assert lost["weighted"] < 0.9 * lost["mse"]
    assert lost["mse"] < 0.95 * lost["minmax"]


def test_what_decides_is_the_output_and_not_the_weights(tmp_path: Path) -> None:
    # Half of the columns are stored well and fed, the other half are neither.
    weights = normal(64, 128)
    weights[:, 64:] = np.sign(weights[:, 64:]) * 0.1
    model = save(tmp_path / "m.safetensors", {"a.weight": weights, "b.weight": normal(64, 128, seed=2)})
    fed = samples(300, 128)
    fed[:, :64] *= 0.01
    path = save_safetensors(tmp_path / "c.safetensors", {"a.gram": gram(fed)})
    outputs = specs("parquet", method="minmax", bit_width=2, group_size=64, symmetric=True, min_accuracy=0.0)
    [measured] = run(model, tmp_path / "first", outputs, calibration=path).outputs
    sums = of(measured, "a.weight").sums
    assert sums.cosine_similarity + 0.02 < sums.output_cosine_similarity
    floor = (sums.cosine_similarity + sums.output_cosine_similarity) / 2
    outputs = specs("parquet", method="minmax", bit_width=2, group_size=64, symmetric=True, min_accuracy=floor)
    by_weights, by_output = (
        run(model, tmp_path / f"w{i}", outputs, calibration=c).outputs[0] for i, c in enumerate((None, path))
    )
    assert of(by_weights, "a.weight").bits > 2
    assert of(by_output, "a.weight").bits == 2
    assert by_output.passed
    assert [t.name for t in by_output.worst] == ["b.weight", "a.weight"]


def test_a_layer_without_calibration_is_quantized_without_and_told_of(model: Path, tmp_path: Path) -> None:
    partial = save_safetensors(tmp_path / "p.safetensors", {"a.gram": gram(FED["a"]), "other.gram": gram(FED["b"])})
    seen: list[Happening] = []
    report = run(model, tmp_path / "work", specs("parquet", method="mse"), calibration=partial, happenings=seen)
    told = [h for h in seen if isinstance(h, Notice)]
    assert [(n.code, n.tensor) for n in told] == [("calibration_unmatched", None), ("calibration_missing", "b.weight")]
    assert "other" in told[0].text
    a, b = (of(report.outputs[0], f"{name}.weight") for name in "ab")
    assert "weighted by the mean square" in a.rule
    assert a.sums.has_output
    assert not b.sums.has_output
    assert b.row()["output_relative_error"] is None
    plain = run(model, tmp_path / "plain", specs("parquet", method="mse"))
    assert of(plain.outputs[0], "b.weight").sums == b.sums
    seen.clear()
    run(model, tmp_path / "minmax", specs("parquet", method="minmax"), calibration=partial, happenings=seen)
    assert codes(seen) == ["calibration_unmatched"], "round to nearest misses nothing"


def test_auto_takes_the_best_that_is_known_of_a_layer_and_says_why(model: Path, calibration: Path) -> None:
    with closing(open_model(model)) as reader, closing(open_calibration(calibration)) as fed:
        for given, rule in (
            (None, "auto: mse, for there is no calibration of it"),
            (fed, "auto: gptq, for there is a Gram matrix"),
        ):
            plan = make_plan(reader, specs("parquet", method="auto"), given)
            assert rule in plan.tensors[1].decisions[0].rule
    chosen = choose_method("auto", frozenset({"mean_square"}))
    assert (chosen.method.id, chosen.reason) == ("mse", "auto: mse, weighted by the mean square of its inputs")


def test_a_method_that_lacks_what_it_needs_gives_way_to_the_next_best(model: Path, tmp_path: Path) -> None:
    partial = {"a.mean_square": (FED["a"] ** 2).mean(0)[None], "b.gram": gram(FED["b"])}
    path = save_safetensors(tmp_path / "c.safetensors", partial)
    seen: list[Happening] = []
    report = run(model, tmp_path / "work", specs("parquet", method="gptq"), calibration=path, happenings=seen)
    a, b = (of(report.outputs[0], f"{name}.weight") for name in "ab")
    assert (a.method, b.method) == ("mse", "gptq")
    [told] = [h for h in seen if isinstance(h, Notice)]
    assert (told.code, told.tensor) == ("calibration_missing", "a.weight")
    assert "gptq needs a Gram matrix, which its calibration lacks: mse instead, weighted by" in told.text
    with closing(open_model(model)) as reader, pytest.raises(InvalidConfig, match="give `calibration`") as refused:
        make_plan(reader, specs("parquet", method="gptq"))
    assert refused.value.pointer == "/config/method"


def test_a_run_goes_on_with_the_same_calibration_and_with_no_other(
    model: Path, calibration: Path, tmp_path: Path
) -> None:
    outputs, seen = specs("parquet", method="mse"), []

    def stop() -> bool:
        return sum(isinstance(h, TensorCompleted) for h in seen) >= 3

    run(model, tmp_path / "undisturbed", outputs, calibration=calibration)
    for folder in ("same", "other"):
        seen.clear()
        with pytest.raises(Cancelled):
            run(model, tmp_path / folder, outputs, calibration=calibration, happenings=seen, cancelled=stop)
    other = save_safetensors(tmp_path / "o.safetensors", {"a.gram": gram(FED["a"][:50]), "b.gram": gram(FED["b"])})
    again: dict[str, list[Happening]] = {"same": [], "other": []}
    reports = {
        name: run(model, tmp_path / name, outputs, calibration=path, happenings=again[name])
        for name, path in (("same", calibration), ("other", other))
    }
    completed = {name: sum(isinstance(h, TensorCompleted) for h in found) for name, found in again.items()}
    assert completed == {"same": 0, "other": 3}
    undisturbed = run(model, tmp_path / "again", outputs, calibration=calibration)
    assert [t.sums for t in reports["same"].outputs[0].tensors] == [t.sums for t in undisturbed.outputs[0].tensors]


def test_data_that_cannot_be_fails_the_run_with_the_layer(model: Path, tmp_path: Path) -> None:
    broken = gram(FED["a"])
    broken[3, 4] = np.nan
    path = save_safetensors(tmp_path / "c.safetensors", {"a.gram": broken})
    with pytest.raises(InvalidCalibration, match=r"a\.gram is not symmetric") as failed:
        run(model, tmp_path / "work", specs("parquet"), calibration=path)
    assert failed.value.tensor == "a.weight"


def test_a_calibration_of_another_model_is_refused_by_its_headers(model: Path, tmp_path: Path) -> None:
    path = save_safetensors(tmp_path / "c.safetensors", {"a.gram": gram(FED["b"])})
    with (
        closing(open_model(model)) as reader,
        pytest.raises(InvalidCalibration, match=r"a\.gram .* wants \[128, 128\]"),
    ):
        make_plan(reader, specs("parquet"), open_calibration(path))


def test_weights_of_timesteps_have_to_be_those_of_the_calibration(model: Path, calibration: Path) -> None:
    with closing(open_model(model)) as reader, closing(open_calibration(calibration)) as fed:
        for weights in ([0.5, 0.5], [-1.0], [0.0]):
            with pytest.raises(InvalidConfig) as refused:
                make_plan(reader, specs("parquet", timestep_weights=weights), fed)
            assert refused.value.pointer == "/config/timestep_weights"


def test_gram_matrices_are_in_the_memory_that_a_plan_asks_for(tmp_path: Path) -> None:
    model = save(tmp_path / "m.safetensors", {"a.weight": normal(64, 2048)})
    path = save_safetensors(tmp_path / "c.safetensors", {"a.gram": np.eye(2048, dtype=np.float32)})
    with closing(open_model(model)) as reader, closing(open_calibration(path)) as fed:
        plans = [make_plan(reader, specs("parquet"), given) for given in (None, fed)]
    without, needed = (need_to_quantize(plan, 1 << 20).nbytes for plan in plans)
    assert needed - without >= 3 * 4 * 2048**2
