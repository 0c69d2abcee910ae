"""How many and how much there is at one moment: of jobs in memory, of what the database and the disk hold."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from service.jobs import blob_table, count_table
from service.jobs.job import Status
from service.jobs.webhooks import delivery_table

_ENDED = frozenset(status.value for status in Status if status.is_terminal)


class Disk(NamedTuple):
    """Bytes of the file system that holds the data folder."""

    used: int
    free: int


@dataclass(frozen=True, slots=True)
class Stored:
    """What the database knows: ended jobs by status, bytes by tenant as quotas count them, files and their bytes.

    `webhooks_pending` are deliveries that have not ended.
    """

    ended: Mapping[str, int] = field(default_factory=dict)
    tenants: Mapping[str, int] = field(default_factory=dict)
    artifact_bytes: int = 0
    blobs: int = 0
    blob_bytes: int = 0
    webhooks_pending: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """All of it. Open jobs by tenant and status; seconds and bytes by stage and backend.

    What cannot be read now is None.
    """

    open_jobs: Mapping[tuple[str, str], int]
    queue_depth: int
    running: int
    readers: int
    stage_seconds: Mapping[tuple[str, str], float]
    stage_bytes: Mapping[tuple[str, str], int]
    stored: Stored | None
    disk: Disk | None


def read_stored(db: sqlite3.Connection) -> Stored:
    """Read from sums that are kept, never from the records. Blocks."""
    ended = {status: jobs for status, jobs in count_table.read(db).items() if status in _ENDED}
    tenants: dict[str, int] = dict(db.execute("SELECT id, stored_bytes FROM tenants WHERE stored_bytes > 0"))
    files, blob_bytes, counted = blob_table.totals(db)
    artifact_bytes = sum(tenants.values()) - counted
    return Stored(ended, tenants, artifact_bytes, files, blob_bytes, delivery_table.pending(db))


def read_disk(data_dir: Path) -> Disk | None:
    """The disk of the data folder; None when it is gone. Blocks."""
    with suppress(OSError):
        usage = shutil.disk_usage(data_dir)
        return Disk(usage.used, usage.free)
    return None
