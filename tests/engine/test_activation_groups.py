"""Activation grids by groups of timesteps: from a calibration over time to the columns of Parquet and the report."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from service.engine import activation_groups
from service.engine.activation_groups import ACTIVATION_BITS, ActivationGrids, Wanted, find_grids
from service.engine.calibration.opening import open_calibration
from service.engine.formats.registry import open_model
from service.engine.plan import make_plan
from service.engine.progress import Happening, Notice, TensorCompleted
from service.engine.report import OutputReport
from service.engine.time_smoothing import grids_at_steps, largest_jump, smoothed
from service.engine.timesteps import group_error, optimal_groups, uniform_groups
from service.errors import Cancelled, InvalidCalibration
from tests.engine.calibrations import gram, samples, save_safetensors
from tests.engine.helpers import normal, run, save, specs

STEPS, COLS = 30, 128
CT = "compressed-tensors"
GROUPS = ("time_group_bounds", "activation_scale", "activation_zero_point")


def fed() -> np.ndarray:
    """Inputs (steps, n, cols) that grow over time, more so at its end, and reach further above 0 than below."""
    growth = 1 + 20 * np.linspace(0, 1, STEPS) ** 6
    return np.stack([samples(40, COLS, seed=step) * growth[step] + 0.3 for step in range(STEPS)]).astype(np.float32)


def over_time(x: np.ndarray) -> dict[str, np.ndarray]:
    """What a collector writes of such inputs."""
    return {
        "timesteps": np.arange(len(x), dtype=np.int64),
        "a.range": np.stack([x.min(axis=(1, 2)), x.max(axis=(1, 2))], axis=1),
        "a.absmax": np.abs(x).max(axis=1),
        "a.mean_square": np.square(x).mean(axis=1),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "m.safetensors", {"a.weight": normal(64, COLS), "b.weight": normal(64, COLS, seed=2)})


def calibration(tmp_path: Path, *left_out: str, **entries: np.ndarray) -> Path:
    """One over timesteps, of the first layer alone."""
    known = over_time(fed()) | {f"a.{name}": array for name, array in entries.items()}
    return save_safetensors(tmp_path / "c.safetensors", {k: v for k, v in known.items() if k not in left_out})


def cells(folder: Path, tensor: str = "a.weight") -> dict[str, Any]:
    """The cells of a tensor's first row."""
    [path] = folder.glob("*.parquet")
    return next(row for row in pq.read_table(path).to_pylist() if row["layer_name"] == tensor)


@pytest.mark.parametrize("grouping", ["optimal", "uniform"])
def test_a_job_stores_the_groups_and_reports_what_they_cost(grouping: str, model: Path, tmp_path: Path) -> None:
    path, limits = calibration(tmp_path), over_time(fed())["a.range"]
    config = {"method": "mse", "num_time_groups": 6, "time_grouping": grouping}
    [output] = run(model, tmp_path / "work", specs("parquet", **config), calibration=path).outputs
    mean = np.full(STEPS, 1 / STEPS)
    optimal, uniform = optimal_groups(limits, 6, 8, mean), uniform_groups(limits, 6, 8)
    expected = optimal if grouping == "optimal" else uniform
    found = cells(tmp_path / "work" / "parquet")
    assert found["time_group_bounds"] == expected.bounds.tolist()
    np.testing.assert_array_equal(found["activation_scale"], expected.scale.astype(np.float32))
    assert found["activation_zero_point"] == expected.zero_point.tolist()
    a, b = output.tensors
    figures = a.time_groups
    assert figures is not None
    assert figures.groups == 6
    errors = [group_error(each, limits, mean) for each in (expected, optimal, uniform, uniform_groups(limits, 1, 8))]
    told = [figures.expected_error, figures.optimal_error, figures.uniform_error, figures.static_error]
    assert told == pytest.approx(errors, rel=1e-9)
    assert figures.optimal_error < 0.8 * figures.uniform_error < 0.3 * figures.static_error
    assert figures.smoothness_before == figures.smoothness_after == pytest.approx(largest_jump(expected.scale))
    assert b.time_groups is None
    assert {cells(tmp_path / "work" / "parquet", "b.weight")[column] for column in GROUPS} == {None}
    assert OutputReport.from_json(output.to_json()) == output


def test_smoothing_is_stored_and_its_price_told(model: Path, tmp_path: Path) -> None:
    path, limits = calibration(tmp_path), over_time(fed())["a.range"]
    config = {"num_time_groups": 6, "smoothness_weight": 0.5, "boundary_window": 2, "boundary_interpolation": "cubic"}
    [output] = run(model, tmp_path / "work", specs("parquet", **config), calibration=path).outputs
    mean = np.full(STEPS, 1 / STEPS)
    optimal = optimal_groups(limits, 6, 8, mean)
    scale, zero = grids_at_steps(smoothed(optimal, limits, 0.5, mean), 2, "cubic")
    found, figures = cells(tmp_path / "work" / "parquet"), output.tensors[0].time_groups
    lengths = np.diff(found["time_group_bounds"])
    np.testing.assert_array_equal(np.repeat(found["activation_scale"], lengths), scale.astype(np.float32))
    np.testing.assert_array_equal(np.repeat(found["activation_zero_point"], lengths), zero)
    assert figures is not None
    assert 6 < figures.groups == len(lengths)
    assert figures.smoothness_after == pytest.approx(largest_jump(scale))
    assert figures.smoothness_after < figures.smoothness_before == pytest.approx(largest_jump(optimal.scale))
    assert figures.expected_error > figures.optimal_error


@pytest.mark.parametrize("method", ["minmax", "awq"])
def test_grids_of_four_bits_leave_out_what_is_rare_and_lose_less(method: str, model: Path, tmp_path: Path) -> None:
    x = fed()  # (steps, samples, cols)
    x[:, 0, 0] *= 5  # rare
    known = over_time(x) | {"a.gram": gram(x.reshape(-1, COLS))}
    lost = {}
    for name, left_out in (("clipped", ()), ("whole", ("a.mean_square",))):
        given = {key: value for key, value in known.items() if key not in left_out}
        path = save_safetensors(tmp_path / f"{name}.safetensors", given)
        outputs = specs("parquet", method=method, num_time_groups=6, activation_bit_width=4)
        run(model, tmp_path / name, outputs, calibration=path)
        found = cells(tmp_path / name / "parquet")
        lengths = np.diff(found["time_group_bounds"])
        scale, zero = (
            np.repeat(found[f"activation_{part}"], lengths)[:, None, None] for part in ("scale", "zero_point")
        )
        divided = x / (1 if found["input_scale"] is None else np.array(found["input_scale"]))
        assert set(zero.ravel()) <= set(range(16))
        rounded = (np.clip(np.rint(divided / scale) + zero, 0, 15) - zero) * scale
        lost[name] = np.square(rounded - divided).mean() / np.square(divided).mean()
    print(lost)
    assert lost["clipped"] < 0.8 * lost["whole"]


def test_what_is_stored_is_counted_as_planned(model: Path, tmp_path: Path) -> None:
    path = calibration(tmp_path)
    for name, config in (("with", {}), ("without", {"enable_time_aware": False})):
        outputs = specs("parquet", num_time_groups=6, **config)
        with closing(open_model(model)) as reader, closing(open_calibration(path)) as opened:
            planned = make_plan(reader, outputs, opened).predicted_bytes(0)
        tensors = run(model, tmp_path / name, outputs, calibration=path).outputs[0].tensors
        assert sum(t.stored_bytes for t in tensors) == planned
        assert (cells(tmp_path / name / "parquet")["time_group_bounds"] is None) == (name == "without")
    with closing(open_model(model)) as reader, closing(open_calibration(path)) as opened:
        sizes = []
        for groups in (1, 20):
            outputs = specs("parquet", bit_width="auto", target_bits_per_weight=5, num_time_groups=groups)
            sizes.append(make_plan(reader, outputs, opened).predicted_bytes(0))
    assert sizes[1] - sizes[0] == 19 * 12


def test_layers_whose_inputs_are_divided_have_grids_for_those(model: Path, tmp_path: Path) -> None:
    outputs = specs("parquet", method="awq", bit_width=3, num_time_groups=6)
    run(model, tmp_path / "work", outputs, calibration=calibration(tmp_path))
    found = cells(tmp_path / "work" / "parquet")
    divided = fed() / np.array(found["input_scale"], np.float32)
    assert np.ptp(found["input_scale"]) > 0
    for first, last, scale, zero in zip(
        found["time_group_bounds"], found["time_group_bounds"][1:], *(found[name] for name in GROUPS[1:]), strict=False
    ):
        largest = np.abs(divided[first:last]).max()
        assert scale * 255 == pytest.approx(2 * largest, rel=1e-5)
        assert zero in (127, 128)


def test_what_keeps_grids_from_being_stored_is_told(model: Path, tmp_path: Path) -> None:
    seen: list[Happening] = []
    path = calibration(tmp_path, "a.absmax")
    run(model, tmp_path / "work", specs("parquet", method="awq"), calibration=path, happenings=seen)
    assert cells(tmp_path / "work" / "parquet")["input_scale"] is not None
    assert cells(tmp_path / "work" / "parquet")["time_group_bounds"] is None
    [told] = [h for h in seen if isinstance(h, Notice) and h.code == "time_groups_left_out"]
    assert "absmax" in told.text
    assert "a.weight" in told.text
    notes = {}
    for name, left_out, format_ in (("none", "a.range", "parquet"), ("kept", "", "parquet"), ("ct", "", CT)):
        path = calibration(tmp_path, left_out)
        with closing(open_model(model)) as reader, closing(open_calibration(path)) as opened:
            notes[name] = make_plan(reader, specs(format_), opened).notes
    assert notes["kept"] == ()
    assert "no `range`" in notes["none"][0]
    assert "compressed-tensors does not keep" in notes["ct"][0]


def test_outputs_of_one_run_have_their_own_groups(model: Path, tmp_path: Path) -> None:
    outputs = [*specs("parquet", num_time_groups=3), *specs(CT), *specs("parquet", num_time_groups=5)]
    outputs[2] = type(outputs[2])("more", "parquet", outputs[2].config)
    reports = run(model, tmp_path / "work", outputs, calibration=calibration(tmp_path)).outputs
    assert [len(cells(tmp_path / "work" / name)["activation_scale"]) for name in ("parquet", "more")] == [3, 5]
    assert [t and t.groups for t in (report.tensors[0].time_groups for report in reports)] == [3, None, 5]


def test_a_run_that_goes_on_reports_the_same_groups(tmp_path: Path) -> None:
    path, seen = calibration(tmp_path), []

    def stop() -> bool:
        return any(isinstance(h, TensorCompleted) for h in seen)

    outputs = specs("parquet", smoothness_weight=0.1)
    # Tensors so large that each has a line of the journal.
    weights = {"a.weight": normal(2304, COLS), "b.weight": normal(2304, COLS, seed=2)}
    large = save(tmp_path / "l.safetensors", weights)
    with pytest.raises(Cancelled):
        run(large, tmp_path / "cut", outputs, calibration=path, happenings=seen, cancelled=stop)
    again = run(large, tmp_path / "cut", outputs, calibration=path).outputs[0]
    whole = run(large, tmp_path / "whole", outputs, calibration=path).outputs[0]
    assert again.tensors[0].time_groups == whole.tensors[0].time_groups is not None
    assert cells(tmp_path / "cut" / "parquet") == cells(tmp_path / "whole" / "parquet")


@pytest.mark.parametrize("broken", [[[1.0, -1.0]], [[np.nan, 1.0]], [[0.0, np.inf]]])
def test_ranges_that_cannot_be_fail_the_run_with_the_layer(broken: Any, model: Path, tmp_path: Path) -> None:
    path = calibration(tmp_path, range=np.repeat(np.array(broken, np.float32), STEPS, axis=0))
    with pytest.raises(InvalidCalibration, match=r"a\.range holds") as failed:
        run(model, tmp_path / "work", specs("parquet"), calibration=path)
    assert failed.value.tensor == "a.weight"


def test_steps_at_which_a_layer_was_not_fed_cost_nothing(model: Path, tmp_path: Path) -> None:
    ranges, count = over_time(fed())["a.range"].copy(), np.ones(STEPS, np.int64)
    ranges[5:9], count[5:9] = np.nan, 0
    path = calibration(tmp_path, range=ranges, count=count)
    [output] = run(model, tmp_path / "work", specs("parquet", num_time_groups=6), calibration=path).outputs
    fed_at = np.flatnonzero(count)
    best = optimal_groups(ranges[fed_at], 6, 8, np.full(len(fed_at), 1 / len(fed_at)))
    figures = output.tensors[0].time_groups
    assert figures is not None
    assert figures.expected_error == pytest.approx(group_error(best, ranges[fed_at]) / len(fed_at))


LIMITS = st.integers(1, 40).flatmap(
    lambda steps: arrays.arrays(np.float32, (steps, 2), elements=st.floats(-100, 100, width=16))
)


@settings(max_examples=60, deadline=None, print_blob=True)
@given(LIMITS, st.integers(1, 12), st.sampled_from([5, 1024]), st.integers(0, 3), st.data())
def test_grids_are_whole_and_optimal_ones_never_worse(
    limits: np.ndarray, count: int, cuts: int, window: int, data: Any
) -> None:
    limits = np.sort(limits, axis=1)
    weights = np.array(data.draw(st.lists(st.floats(0, 9), min_size=len(limits), max_size=len(limits))))
    found: dict[str, ActivationGrids | None] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_groups, "MOST_CUTS", cuts)  # as if there were more steps than cuts
        for grouping in ("optimal", "uniform"):
            wanted = Wanted(count, grouping, boundary_window=window)
            found[grouping] = grids = find_grids(limits, weights, wanted)
            if grids is None:
                assert not limits.any()
                return
            assert (grids.bounds[0], grids.bounds[-1]) == (0, len(limits))
            assert (np.diff(grids.bounds.astype(int)) > 0).all()
            assert len(grids.scale) == len(grids.zero_point) == grids.figures.groups <= wanted.most_groups(len(limits))
            assert (grids.scale > 0).all()
            assert set(grids.zero_point) <= set(range(2**ACTIVATION_BITS))
    optimal, uniform = found["optimal"], found["uniform"]
    assert optimal is not None
    assert uniform is not None
    assert optimal.figures.optimal_error <= uniform.figures.uniform_error * (1 + 1e-9)
    assert uniform.figures.uniform_error <= uniform.figures.static_error * (1 + 1e-9)


@pytest.mark.parametrize(
    "config",
    [
        {"time_grouping": "best"},
        {"smoothness_weight": -1},
        {"smoothness_weight": float("nan")},
        {"boundary_window": -1},
        {"activation_bit_width": 7},
    ],
)
def test_settings_out_of_bounds_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(config))):
        specs("parquet", **config)
