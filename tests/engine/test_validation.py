"""Validating with a checkpoint: interrupted anywhere, a run ends with the figures of an undisturbed one."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.engine.backends.reference import ReferenceBackend
from service.engine.formats.registry import open_model
from service.engine.progress import Happening, Notice, Progress, TensorCompleted
from service.engine.report import RunReport
from service.engine.validation import validate
from service.errors import Cancelled
from tests.engine.helpers import normal, save


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A model and another one of the same shapes, with a table of integers that differs."""
    found = []
    for name, shift in (("one", 0.0), ("other", 0.01)):
        tensors = {f"layers.{i}.weight": normal(32, 64, seed=i) + np.float32(shift) for i in range(6)}
        found.append(save(tmp_path / f"{name}.safetensors", tensors | {"a.steps": np.arange(7) + (name == "one")}))
    return found[0], found[1]


def compare(models: tuple[Path, Path], work: Path | None, stop_after: int = 100) -> tuple[RunReport, list[Happening]]:
    """Validate, stopped behind so many tensors."""
    told: list[Happening] = []
    with closing(open_model(models[0])) as original, closing(open_model(models[1])) as quantized:
        report = validate(
            original, quantized, min_accuracy=0.9, backend=ReferenceBackend(), block_bytes=1 << 16, work=work,
            report=told.append, cancelled=lambda: sum(isinstance(t, TensorCompleted) for t in told) >= stop_after,
        )  # fmt: skip
    return report, told


def figures(report: RunReport) -> list[object]:
    """All that does not depend on the clock."""
    tensors = [replace(tensor, seconds=0.0) for tensor in report.outputs[0].tensors]
    return [*tensors, report.warnings, report.outputs[0].passed]


@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_an_interrupted_validation_goes_on_behind_its_last_tensor(
    models: tuple[Path, Path], tmp_path: Path, stop_after: int
) -> None:
    expected, all_told = compare(models, None)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(Cancelled):
        compare(models, work, stop_after)
    report, told = compare(models, work)
    assert figures(report) == figures(expected)
    assert len(report.warnings) == 1
    assert sum(isinstance(t, TensorCompleted) for t in told) == 7 - stop_after
    assert sum(isinstance(t, Notice) for t in all_told) == 1
    first = next(t for t in told if isinstance(t, Progress))
    assert first.tensors_done == stop_after
    assert first.bytes_done > 0


def test_a_model_that_has_changed_is_measured_from_the_start(models: tuple[Path, Path], tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(Cancelled):
        compare(models, work, 3)
    tensors = {f"layers.{i}.weight": normal(32, 64, seed=i) for i in range(6)}
    save(models[1], tensors | {"a.steps": np.arange(7)})
    report, told = compare(models, work)
    assert sum(isinstance(t, TensorCompleted) for t in told) == 7
    assert figures(report) == figures(compare(models, None)[0])
