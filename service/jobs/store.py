"""Jobs and their events in SQLite: what a restart begins with, and all that is known of ended jobs."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

from service.errors import DiskFull, StorageFailure
from service.jobs.events import RESUMED, TENSOR_COMPLETED, Event
from service.jobs.job import Job, Status
from service.jobs.record import from_record, to_record
from service.storage.faults import storage_faults

DATABASE = "arrowquant.sqlite3"
LOCK = "arrowquant.lock"

#: Each brings the schema from the version of its index to the next; never edited, only added to.
MIGRATIONS = (
    """
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        status TEXT NOT NULL,
        created_at TEXT NOT NULL,
        record TEXT NOT NULL
    );
    CREATE INDEX jobs_by_status ON jobs (status, id);
    CREATE INDEX jobs_by_kind ON jobs (kind, id);
    CREATE TABLE labels (
        key TEXT NOT NULL,
        value TEXT NOT NULL,
        job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        PRIMARY KEY (key, value, job_id)
    ) WITHOUT ROWID;
    CREATE INDEX labels_by_job ON labels (job_id);
    CREATE TABLE events (
        job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        id INTEGER NOT NULL,
        type TEXT NOT NULL,
        at TEXT NOT NULL,
        data TEXT NOT NULL,
        PRIMARY KEY (job_id, id)
    ) WITHOUT ROWID;
    """,
)

_ACTIVE = tuple(status.value for status in Status if not status.is_terminal)


class Store:
    """The database of one data folder, held by one process. Thread-safe; every method may block.

    Raises DiskFull or StorageFailure when the database cannot be read or written.
    """

    def __init__(self, data_dir: Path) -> None:
        """Open or create the database; raises StorageFailure when another process holds it."""
        self._lock = threading.RLock()
        with storage_faults("opening the data folder"):
            data_dir.mkdir(parents=True, exist_ok=True)
            self._held = _hold(data_dir / LOCK)
        try:
            with _database_faults():
                self._db = _open(data_dir / DATABASE)
                _migrate(self._db)
        except BaseException:
            self._held.close()
            raise

    def close(self) -> None:
        """Close the database and let another process have it."""
        with self._lock:
            self._db.close()
            self._held.close()

    def add(self, job: Job, events: Sequence[Event]) -> None:
        """Store a new job with its first events."""
        labels = [(key, value, job.id) for key, value in job.request.labels.items()]
        with self._transaction() as db:
            db.execute(
                "INSERT INTO jobs (id, kind, status, created_at, record) VALUES (?, ?, ?, ?, ?)",
                (job.id, job.request.kind, job.status, _text(job.created_at), to_record(job)),
            )
            db.executemany("INSERT INTO labels (key, value, job_id) VALUES (?, ?, ?)", labels)
            _append(db, events)

    def write(self, jobs: Sequence[Job], events: Sequence[Event]) -> None:
        """Store new states of known jobs and append events, all or nothing."""
        changes = [(job.status, to_record(job), job.id) for job in jobs]
        with self._transaction() as db:
            db.executemany("UPDATE jobs SET status = ?, record = ? WHERE id = ?", changes)
            _append(db, events)

    def get(self, job_id: str) -> Job | None:
        """The job of this id."""
        rows = self._rows("SELECT record FROM jobs WHERE id = ?", (job_id,))
        return from_record(rows[0][0]) if rows else None

    def active(self) -> list[Job]:
        """All jobs that have not ended, oldest first."""
        marks = ", ".join("?" * len(_ACTIVE))
        rows = self._rows(f"SELECT record FROM jobs WHERE status IN ({marks}) ORDER BY id", _ACTIVE)
        return [from_record(row[0]) for row in rows]

    def find(
        self,
        *,
        status: Status | None = None,
        kind: str | None = None,
        label: tuple[str, str] | None = None,
        created_after: datetime | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> tuple[list[Job], str | None]:
        """Jobs, newest first, behind the cursor `after`; and the cursor of the next page, if there is one."""
        where: list[str] = []
        values: list[Any] = []
        for condition, value in (("status = ?", status), ("kind = ?", kind), ("id < ?", after)):
            if value is not None:
                where.append(condition)
                values.append(value)
        if label is not None:
            where.append("key = ? AND value = ?")
            values += label
        if created_after is not None:
            # Ids begin with their time: the index ends the search, created_at then decides to the microsecond.
            where.append("id >= ? AND created_at > ?")
            values += [_first_id_at(created_after), _text(created_after)]
        # A cross join keeps this order: labels lead the search, whatever the planner believes.
        tables = "jobs" if label is None else "labels CROSS JOIN jobs ON jobs.id = labels.job_id"
        order = "id" if label is None else "job_id"
        condition = f"WHERE {' AND '.join(where)}" if where else ""
        query = f"SELECT record FROM {tables} {condition} ORDER BY {order} DESC LIMIT ?"
        jobs = [from_record(row[0]) for row in self._rows(query, (*values, limit + 1))]
        return jobs[:limit], jobs[limit - 1].id if len(jobs) > limit else None

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Stored events with larger ids than `after`, in order; terminal ones with the job."""
        rows = self._rows(
            "SELECT id, type, at, data FROM events WHERE job_id = ? AND id > ? ORDER BY id LIMIT ?",
            (job_id, after, limit),
        )
        events = [Event(row[0], row[1], job_id, datetime.fromisoformat(row[2]), json.loads(row[3])) for row in rows]
        if events and events[-1].is_terminal:
            last = events[-1]
            events[-1] = Event(last.id, last.type, job_id, last.at, last.data, self.get(job_id))
        return events

    def tensors_told(self, job_id: str) -> set[tuple[str, str]]:
        """Output and name of every tensor whose completion is stored."""
        rows = self._rows("SELECT data FROM events WHERE job_id = ? AND type = ?", (job_id, TENSOR_COMPLETED))
        return {(data["output"], data["name"]) for data in (json.loads(row[0]) for row in rows)}

    def last_event_id(self, job_id: str) -> int:
        """The largest id stored for a job; 0 when there is none."""
        return int(self._rows("SELECT coalesce(max(id), 0) FROM events WHERE job_id = ?", (job_id,))[0][0])

    def seconds_run(self, job_id: str) -> float:
        """How long a job has run, as far as its events tell: without the time the server was down."""
        rows = self._rows("SELECT type, at FROM events WHERE job_id = ? AND id > 1 ORDER BY id", (job_id,))
        times = [(row[0], datetime.fromisoformat(row[1])) for row in rows]
        steps = pairwise(times)
        return sum((at - before).total_seconds() for (_, before), (type_, at) in steps if type_ != RESUMED)

    def delete(self, job_id: str) -> bool:
        """Remove a job with its events; False when there was none."""
        with self._transaction() as db:
            return db.execute("DELETE FROM jobs WHERE id = ?", (job_id,)).rowcount > 0

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _database_faults():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors, such as a full disk.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, _database_faults():
            return self._db.execute(query, values).fetchall()


def _append(db: sqlite3.Connection, events: Sequence[Event]) -> None:
    rows = [(e.job_id, e.id, e.type, _text(e.at), json.dumps(e.data, separators=(",", ":"))) for e in events]
    db.executemany("INSERT INTO events (job_id, id, type, at, data) VALUES (?, ?, ?, ?, ?)", rows)


def _hold(path: Path) -> Any:
    """The open lock file; the lock goes with the process, however it ends."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read(32).strip() or "unknown"
        file.close()
        raise StorageFailure(
            f"the data folder is in use by another server (process {owner}): stop it, or choose another --data-dir"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    # In WAL mode a commit then survives the process, and the database a power cut.
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA foreign_keys = ON")
    return db


def _migrate(db: sqlite3.Connection) -> None:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        db.close()
        raise StorageFailure(
            f"the data folder was written by a newer version of this service (schema {version}, known up to "
            f"{len(MIGRATIONS)}): use that version, or another --data-dir"
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")


@contextmanager
def _database_faults() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise DiskFull("there was no space left while writing the job database: free some and try again") from error
        raise StorageFailure(f"the job database reported {str(error)!r}") from error


def _text(time: datetime) -> str:
    """A time so that texts sort as times do."""
    return _in_utc(time).isoformat(timespec="microseconds")


def _first_id_at(time: datetime) -> str:
    """The smallest job id of this millisecond: a UUIDv7 begins with it."""
    return f"job_{UUID(int=max(0, int(_in_utc(time).timestamp() * 1000)) << 80)}"


def _in_utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError:
        # Within a day of either end of the calendar the time in UTC may lie beyond it.
        return time.replace(tzinfo=UTC)
