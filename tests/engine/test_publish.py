"""Publishing a finished folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.engine.publish import publish
from service.errors import TargetInUse


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
