"""When a server is killed, and what it was at: the second is read off the files that it left."""

from __future__ import annotations

import random
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from bench.kill_clients import Clients
from bench.retrying import wait_for_file
from service.jobs.store import DATABASE

#: To wait for what is aimed at; a server that is not at it by then is killed all the same.
PATIENCE_S = 3.0
CLOSING = ("*/*/manifest.json", "*/*/*.parquet", "*/*/*.partial")
PUBLISHING = ("*/report.json",)


@dataclass(frozen=True, slots=True)
class Aim:
    """Something to wait for, and how long to wait then at most."""

    name: str
    then_s: float


#: A third of the kills come at any moment; the others are aimed at what is over in milliseconds.
ANY = Aim("any moment", 2.5)
AIMS = (
    Aim("POST", 0.03),
    Aim("DELETE", 0.05),
    Aim("purge", 0.02),
    Aim("PUT", 0.25),
    Aim("closing", 0.05),
    Aim("publishing", 0.01),
)


def choose(rng: random.Random) -> Aim:
    """What the next kill is aimed at."""
    return rng.choice((ANY, ANY, ANY, *AIMS))


def wait_for(aim: Aim, clients: Clients, work: Path, rng: random.Random) -> None:
    """Wait for the moment."""
    if aim.name in ("closing", "publishing"):
        wait_for_file(work, CLOSING if aim.name == "closing" else PUBLISHING, PATIENCE_S)
    elif aim is not ANY:
        clients.calls.wait_for_next(aim.name, PATIENCE_S)
    time.sleep(rng.uniform(0, aim.then_s))


def found(data: Path) -> Counter[str]:
    """What a dead server was at: its jobs by stage, purges and uploads that were not complete."""
    statuses = _statuses(data)
    stages = Counter(
        _stage(data, job_id, status)
        for job_id, status in statuses.items()
        if status not in ("succeeded", "failed", "cancelled")
    )
    stages["purging"] += sum(path.name not in statuses for path in (data / "artifacts").glob("*"))
    stages["uploading"] += sum(1 for _ in (data / "blobs" / "parts").glob("*/*"))
    return +stages


def _stage(data: Path, job_id: str, status: str) -> str:
    work, artifacts = data / "work" / job_id, data / "artifacts" / job_id
    if status != "running":
        return status
    if (artifacts / "report.json").exists():
        return "published, its end not stored"
    if (work / "report.json").exists():
        return "publishing"
    if any(next(work.glob(pattern.removeprefix("*/")), None) is not None for pattern in CLOSING):
        return "closing and sealing"
    return "quantizing" if (work / "checkpoint.jsonl").exists() else "starting, or validating"


def _statuses(data: Path) -> dict[str, str]:
    """Read from a copy: whoever opens the database itself changes what a restart finds."""
    with tempfile.TemporaryDirectory() as folder:
        for path in data.glob(f"{DATABASE}*"):
            if not path.name.endswith("-shm"):
                shutil.copy(path, folder)
        with closing(sqlite3.connect(Path(folder) / DATABASE)) as db:
            return dict(db.execute("SELECT id, status FROM jobs"))
