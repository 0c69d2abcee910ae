"""What the files of a Parquet output are called, while they are written and afterwards."""

from __future__ import annotations

import re
from pathlib import Path

from service.engine.formats.parquet_schema import BYTE_COLUMNS, SUFFIX


class Names:
    """Paths of an output in one folder."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem = folder, stem

    def part(self, number: int) -> Path:
        """A file in the making."""
        return self._folder / f"{self._stem}.part-{number:05d}"

    def final(self, number: int) -> Path:
        """The same when it is whole."""
        return self._folder / f"{self._stem}-{number:05d}{SUFFIX}"

    def spool(self, column: int) -> Path:
        """Where cells of one of BYTE_COLUMNS wait."""
        return self._folder / f"{self._stem}.spool-{BYTE_COLUMNS[column]}"

    def drop_behind(self, last: int) -> None:
        """Remove files with higher numbers, whole or not."""
        ours = re.compile(rf"{re.escape(self._stem)}(?:\.part-(\d+)|-(\d+){re.escape(SUFFIX)})")
        for path in list(self._folder.iterdir()):
            found = ours.fullmatch(path.name)
            if found and int(found[1] or found[2]) > last:
                path.unlink()
