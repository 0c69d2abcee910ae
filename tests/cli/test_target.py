"""Where a command may put what it makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.cli.target import refuse_inside
from service.errors import InvalidConfig
from tests.engine.helpers import files_of, normal, save_folder


@pytest.mark.parametrize("out", ["model/new", "model/sub/new", "alias/new", "model", ".", "model/../model/new"])
def test_a_folder_inside_or_around_the_model_is_refused(tmp_path: Path, out: str) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(tmp_path / "model")
    with pytest.raises(InvalidConfig, match="--out"):
        refuse_inside(tmp_path / out, tmp_path / "model")


@pytest.mark.parametrize("out", ["model-int4", "model.out/new", "new/model"])
def test_a_folder_beside_the_model_is_fine(tmp_path: Path, out: str) -> None:
    (tmp_path / "model").mkdir()
    refuse_inside(tmp_path / out, tmp_path / "model")


def test_a_folder_beside_a_model_that_is_a_file_is_fine(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    refuse_inside(tmp_path / "out", tmp_path / "model.safetensors")


def test_nothing_is_written_into_the_model_that_a_command_reads(tmp_path: Path) -> None:
    model = save_folder(tmp_path / "model", {"w.weight": normal(64, 128)})
    before = files_of(model)
    command = [sys.executable, "-m", "service", "quantize", str(model), "--out", str(model / "q" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, files_of(model)) == (2, before)
    assert "lies in the model" in done.stderr
    assert not (model / "q").exists()
