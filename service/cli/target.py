"""The folder that a command makes: whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from service.engine.publish import publish
from service.errors import InvalidConfig, TargetInUse

REPORT, PAGE = "report.json", "report.html"


def refuse_occupied(out: Path) -> None:
    """Raise TargetInUse unless `out` is absent or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TargetInUse(f"{out} exists and is not an empty folder; choose another with --out")


def refuse_inside(out: Path, source: Path) -> None:
    """Raise InvalidConfig when `out` would lie in the model folder `source`, or around it."""
    inner, outer = out.resolve(), source.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise InvalidConfig(f"{out} lies in the model {source}, or around it; choose another with --out")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `out` at the end, and is gone when anything was raised."""
    refuse_occupied(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: publishing is then a rename, and no other disk can be full.
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / "out"
        folder.mkdir()
        yield folder
        publish(folder, out)


def write_report(folder: Path, report: dict[str, Any], page: str) -> None:
    """Put the quality report beside the outputs, for programs and for eyes."""
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    (folder / PAGE).write_text(page, encoding="utf-8")
