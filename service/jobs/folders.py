"""Where a job's files lie in the data folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from service.engine.checkpoint import JOURNAL
from service.storage.durable import remove

REPORT = "report.json"


class Folders:
    """`work/<job>` while a job runs, `artifacts/<job>` when it has succeeded."""

    def __init__(self, data_dir: Path) -> None:
        self._work = data_dir / "work"
        self._artifacts = data_dir / "artifacts"

    def create(self) -> None:
        """Make the two folders; raises OSError."""
        self._work.mkdir(parents=True, exist_ok=True)
        self._artifacts.mkdir(parents=True, exist_ok=True)

    def work(self, job_id: str) -> Path:
        """What the engine writes to: a folder per output, and its checkpoint."""
        return self._work / job_id

    def checkpoint(self, job_id: str) -> Path:
        """The journal that a job which was interrupted goes on from."""
        return self._work / job_id / JOURNAL

    def artifacts(self, job_id: str) -> Path:
        """A folder per output without an address of its own, and the report."""
        return self._artifacts / job_id

    def pending_report(self, job_id: str) -> Path:
        """There from when all outputs are complete until all are published."""
        return self._work / job_id / REPORT

    def report(self, job_id: str) -> Path:
        """There when all outputs are published."""
        return self._artifacts / job_id / REPORT

    def inputs(self, job_id: str) -> Path:
        """Links to the blobs that a running job reads. No output can have this name: they begin with no dot."""
        return self._work / job_id / ".inputs"

    @property
    def room(self) -> Path:
        """Where folders for a moment may be made."""
        return self._work

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """The path of a folder that may be made, and is gone afterwards."""
        path = self._work / f".scratch-{uuid4().hex}"
        try:
            yield path
        finally:
            remove(path)

    def remove(self, job_id: str) -> None:
        """Remove all files of a job."""
        remove(self.work(job_id))
        remove(self.artifacts(job_id))

    def remove_outputs(self, job_id: str) -> bool:
        """Remove what a job wrote, but not its report; whether nothing of it is left."""
        folder = self.artifacts(job_id)
        outputs = [path for path in folder.iterdir() if path.name != REPORT] if folder.is_dir() else []
        for path in outputs:
            remove(path)
        return not any(path.exists() for path in outputs)

    def are_gone(self, job_id: str) -> bool:
        """Whether a job has no files."""
        return not (self.work(job_id).exists() or self.artifacts(job_id).exists())

    def in_work(self) -> list[str]:
        """The jobs that have a work folder, which are few: those that run, and what a crash left."""
        return [path.name for path in self._work.iterdir()]

    def with_artifacts(self) -> Iterator[str]:
        """The jobs that have a folder of artifacts, as it is read; raises OSError."""
        with os.scandir(self._artifacts) as entries:
            for entry in entries:
                yield entry.name
