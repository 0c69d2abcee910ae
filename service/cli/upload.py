"""Sends a model on this disk to a service: what the service has already is not sent again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from service.cli.client import Server
from service.cli.display import Display, Transfer, open_display
from service.cli.outcome import USAGE, Failed
from service.engine.formats.walk import walk

READ_BYTES = 4 << 20
INDEX_SUFFIX = ".index.json"


def upload_source(server: Server, source: Path) -> dict[str, Any]:
    """Send all files of a model, or the rest of those that were cut; the source that a job then names.

    Raises Failed.
    """
    files = _files(source)
    with open_display() as display:
        meter = _Meter(display, "hashing", files)
        digests = {name: _digest(path, meter.advance) for name, path in meter.each()}
        meter = _Meter(display, "uploading", files)
        for name, path in meter.each():
            server.upload(path, digests[name], meter.reach)
    return {"type": "blobs", "files": {name: f"sha256:{digest}" for name, digest in digests.items()}}


class _Meter:
    """How far a pass over all files has come."""

    def __init__(self, display: Display, stage: str, files: dict[str, Path]) -> None:
        self._display, self._stage, self._files = display, stage, files
        self._sizes = {name: path.stat().st_size for name, path in files.items()}
        self._total = sum(self._sizes.values())
        self._begun = time.monotonic()
        self._before = self._now = self._moved = 0
        self._count = 0

    def each(self) -> Iterator[tuple[str, Path]]:
        """The files, one after the other."""
        for name, path in self._files.items():
            self._now = 0
            yield name, path
            self._before += self._sizes[name]
            self._count += 1
            self._now = 0
            self._show()

    def advance(self, count: int) -> None:
        """So many bytes more of this file."""
        self.reach(self._now + count, count)

    def reach(self, position: int, moved: int = 0) -> None:
        """This file is worked on up to a position, of which `moved` bytes were work."""
        self._now = position
        self._moved += moved
        self._show()

    def _show(self) -> None:
        fraction = (self._before + self._now) / self._total if self._total else 1.0
        rate = self._moved / max(time.monotonic() - self._begun, 1e-3)
        self._display(Transfer(min(1.0, fraction), self._stage, self._count, len(self._files), rate))


def _files(source: Path) -> dict[str, Path]:
    """What belongs to a model: path in its folder to path here. Hidden files stay; links are followed."""
    if not source.exists():
        raise Failed({"code": "model_not_found", "detail": f"{source} does not exist"})
    if source.is_file() and not source.name.endswith(INDEX_SUFFIX):
        return {source.name: source}
    root = source.parent if source.is_file() else source
    files = {name.as_posix(): root / name for name in walk(root).files}
    if not files:
        raise Failed({"code": "model_not_found", "detail": f"{source} holds no files"}, status=USAGE)
    return files


def _digest(path: Path, advance: Callable[[int], None]) -> str:
    running = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            running.update(chunk)
            advance(len(chunk))
    return running.hexdigest()
