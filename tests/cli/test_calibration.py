"""`arrowquant quantize --calibration`: here, on a server, and sent to one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import make_model, run
from tests.engine.calibrations import gram, samples, save_safetensors
from tests.server import Server


def report(out: Path) -> dict[str, Any]:
    """What lies beside the outputs."""
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


@pytest.mark.parametrize("way", ["here", "there", "sent"])
def test_a_calibration_is_used_wherever_the_model_is_quantized(
    server: Server, model_root: Path, tmp_path: Path, way: str
) -> None:
    folder = model_root / tmp_path.name if way == "there" else tmp_path
    folder.mkdir(exist_ok=True)
    make_model(folder / "model", tensors=2, rows=64)
    path = save_safetensors(folder / "fed.safetensors", {"blocks.0.gram": gram(samples(100, 512))})
    options = {"here": [], "there": ["--server", server.base_url], "sent": ["--server", server.base_url, "--upload"]}
    done = run("quantize", folder / "model", "--calibration", path, "--method", "auto", "--out", tmp_path / "out",
               "--format", "parquet", *options[way])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "calibration_missing" in done.stderr or "the calibration does not tell" in done.stderr
    assert "error of the outputs" in done.stdout
    [output] = report(tmp_path / "out")["outputs"]
    assert {t["name"]: t["method"] for t in output["tensors"]} == {"blocks.0.weight": "gptq", "blocks.1.weight": "mse"}


def test_a_calibration_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    make_model(tmp_path / "model", tensors=1, rows=64)
    done = run(
        "quantize", tmp_path / "model", "--calibration", tmp_path / "none.safetensors", "--out", tmp_path / "out"
    )
    assert done.returncode != 0
    assert "none.safetensors does not exist" in done.stderr
    assert not (tmp_path / "out").exists()
