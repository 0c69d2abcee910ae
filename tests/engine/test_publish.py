"""Publishing a finished folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from service.engine.formats.registry import open_model
from service.engine.publish import copy_companions, publish
from service.errors import SourceChanged, TargetInUse
from tests.engine.helpers import normal, save_folder


def _finished(tmp_path: Path) -> Path:
    folder = tmp_path / "work" / "out"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"w")
    return folder


def test_a_folder_appears_under_its_final_name(tmp_path: Path) -> None:
    publish(_finished(tmp_path), tmp_path / "deep" / "target")
    assert (tmp_path / "deep" / "target" / "weights").read_bytes() == b"w"
    assert not (tmp_path / "work" / "out").exists()


def test_an_empty_target_is_free(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    publish(_finished(tmp_path), tmp_path / "target")
    assert (tmp_path / "target" / "weights").exists()


@pytest.mark.parametrize("kind", ["folder with files", "file"])
def test_a_target_that_is_not_free_keeps_what_it_has(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_bytes(b"mine")
    else:
        target.mkdir()
        (target / "mine").write_bytes(b"mine")
    with pytest.raises(TargetInUse, match="target"):
        publish(_finished(tmp_path), target)
    assert (target if kind == "file" else target / "mine").read_bytes() == b"mine"


def test_another_file_system_is_crossed_by_copying_beside_the_target(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    import tempfile

    with tempfile.TemporaryDirectory(dir=memory) as other:
        publish(_finished(tmp_path), Path(other) / "target")
        assert [p.name for p in Path(other).iterdir()] == ["target"]
        assert (Path(other) / "target" / "weights").read_bytes() == b"w"
    assert not (tmp_path / "work" / "out").exists()


def _linked(companion: Path, secret: Path) -> None:
    companion.unlink()
    companion.symlink_to(secret)


def _rewritten(companion: Path, secret: Path) -> None:
    companion.write_bytes(secret.read_bytes())


def _removed(companion: Path, secret: Path) -> None:
    del secret
    companion.unlink()


def _a_pipe(companion: Path, secret: Path) -> None:
    del secret
    companion.unlink()
    os.mkfifo(companion)


@pytest.mark.parametrize("change", [_linked, _rewritten, _removed, _a_pipe])
def test_a_companion_that_changed_since_the_model_was_opened_is_not_copied(
    tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    model = save_folder(tmp_path / "model", {"w.weight": normal(4, 4)})
    (tmp_path / "secret").write_text("not to be copied")
    reader = open_model(model)
    (tmp_path / "out").mkdir()
    change(model / "tokenizer.json", tmp_path / "secret")
    with pytest.raises(SourceChanged, match=r"tokenizer\.json"):
        copy_companions(reader.layout, tmp_path / "out", lambda _: None)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    reader.close()


def test_a_nested_companion_may_be_called_as_the_manifest_is(tmp_path: Path) -> None:
    model = save_folder(tmp_path / "model", {"w.weight": normal(4, 4)})
    (model / "sub").mkdir()
    (model / "sub" / "manifest.json").write_text("mine")
    reader = open_model(model)
    (tmp_path / "out").mkdir()
    copy_companions(reader.layout, tmp_path / "out", lambda _: None)
    assert (tmp_path / "out" / "sub" / "manifest.json").read_text() == "mine"
    reader.close()
