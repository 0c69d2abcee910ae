"""Jobs and their events in SQLite: what a restart begins with, and all that is known of ended jobs."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from service.errors import DiskFull, StorageFailure
from service.jobs import batch_table, blob_table, count_table, key_table, retention_table, search_table
from service.jobs.batch import Batch
from service.jobs.events import TENSOR_COMPLETED, Event
from service.jobs.idempotency import Key
from service.jobs.job import Job, Status
from service.jobs.quotas import Limits, Usage
from service.jobs.record import from_record, to_record
from service.jobs.times import text_of
from service.jobs.webhooks import delivery_table, secret_table
from service.storage.faults import storage_faults

DATABASE = "arrowquant.sqlite3"
LOCK = "arrowquant.lock"
#: Columns of a tenant, as the fields of Limits.
LIMITS = "max_open_jobs, max_stored_bytes, tenants.requests_per_minute"
#: What SQLite says of a database whose free pages can be given back a few at a time.
INCREMENTAL = 2
#: How long a write waits for another connection's.
BUSY_TIMEOUT_S = 10.0

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
    # Tenants and their keys. Triggers keep the sum of stored bytes, so that asking for it costs the same at a
    # million jobs.
    """
    ALTER TABLE jobs ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
    ALTER TABLE jobs ADD COLUMN stored_bytes INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX jobs_by_tenant ON jobs (tenant, id);
    CREATE INDEX jobs_by_tenant_and_status ON jobs (tenant, status, id);
    CREATE INDEX jobs_by_tenant_and_kind ON jobs (tenant, kind, id);
    ALTER TABLE labels ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
    CREATE INDEX labels_by_tenant ON labels (tenant, key, value, job_id);
    CREATE TABLE tenants (
        id TEXT PRIMARY KEY,
        stored_bytes INTEGER NOT NULL DEFAULT 0,
        max_open_jobs INTEGER,
        max_stored_bytes INTEGER,
        requests_per_minute INTEGER
    ) WITHOUT ROWID;
    CREATE TABLE api_keys (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        name TEXT NOT NULL,
        digest BLOB NOT NULL,
        scopes TEXT NOT NULL,
        requests_per_minute INTEGER,
        created_at TEXT NOT NULL,
        expires_at TEXT,
        revoked_at TEXT
    ) WITHOUT ROWID;
    CREATE TRIGGER count_new_job AFTER INSERT ON jobs WHEN new.stored_bytes > 0 BEGIN
        INSERT INTO tenants (id, stored_bytes) VALUES (new.tenant, new.stored_bytes)
            ON CONFLICT (id) DO UPDATE SET stored_bytes = stored_bytes + excluded.stored_bytes;
    END;
    CREATE TRIGGER count_changed_job AFTER UPDATE OF stored_bytes ON jobs
    WHEN new.stored_bytes <> old.stored_bytes BEGIN
        INSERT INTO tenants (id, stored_bytes) VALUES (new.tenant, new.stored_bytes - old.stored_bytes)
            ON CONFLICT (id) DO UPDATE SET stored_bytes = stored_bytes + excluded.stored_bytes;
    END;
    CREATE TRIGGER count_deleted_job AFTER DELETE ON jobs WHEN old.stored_bytes > 0 BEGIN
        UPDATE tenants SET stored_bytes = stored_bytes - old.stored_bytes WHERE id = old.tenant;
    END;
    UPDATE jobs SET stored_bytes = coalesce(
        (SELECT sum(json_extract(value, '$.size_bytes')) FROM json_each(record, '$.artifacts')
            WHERE instr(json_extract(value, '$.location'), jobs.id)), 0);
    """,
    key_table.SCHEMA + batch_table.SCHEMA,
    blob_table.SCHEMA,
    retention_table.SCHEMA,
    delivery_table.SCHEMA + secret_table.SCHEMA,
    search_table.SCHEMA,
    count_table.SCHEMA,
)

_ACTIVE = tuple(status.value for status in Status if not status.is_terminal)


class Store:
    """The database of one data folder, held by one process. Thread-safe; every method may block.

    Raises DiskFull or StorageFailure when the database cannot be read or written.
    """

    def __init__(self, data_dir: Path, *, as_it_is: bool = False) -> None:
        """Open or create the database in this schema; raises StorageFailure when another process holds it.

        `as_it_is` changes no schema, and raises StorageFailure where it is that of an earlier version.
        """
        self._lock = threading.RLock()
        with storage_faults("opening the data folder"):
            data_dir.mkdir(parents=True, exist_ok=True)
            self._held = _hold(data_dir / LOCK)
        try:
            with database_faults():
                self._db = _open(data_dir / DATABASE)
                _migrate(self._db, as_it_is=as_it_is)
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
        self.add_all([job], events)

    def add_all(
        self,
        jobs: Sequence[Job],
        events: Sequence[Event],
        batch: Batch | None = None,
        kept: tuple[Key, str] | None = None,
    ) -> bool:
        """Store new jobs with their first events, their batch, and the answer to the call that made them; or none.

        Whether webhooks are to be told of any.
        """
        columns = "id, tenant, kind, status, created_at, record, batch_id"
        rows = [
            (job.id, job.tenant, job.request.kind, job.status, text_of(job.created_at), to_record(job), job.batch_id)
            for job in jobs
        ]
        labels = [
            (key, value, job.id, job.tenant, job.request.kind, job.status)
            for job in jobs
            for key, value in job.request.labels.items()
        ]
        with self.transaction() as db:
            if kept is not None:
                key_table.keep(db, *kept)
            if batch is not None:
                batch_table.insert(db, batch)
            db.executemany(f"INSERT INTO jobs ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            db.executemany(
                "INSERT INTO labels (key, value, job_id, tenant, kind, status) VALUES (?, ?, ?, ?, ?, ?)", labels
            )
            return _append(db, events)

    def write(self, jobs: Sequence[Job], events: Sequence[Event]) -> bool:
        """Store new states of known jobs and append events, all or nothing; whether webhooks are to be told of any."""
        changes = [(job.status, to_record(job), _stored_bytes(job), _kept_since(job), job.id) for job in jobs]
        with self.transaction() as db:
            db.executemany(
                "UPDATE jobs SET status = ?, record = ?, stored_bytes = ?, kept_since = ? WHERE id = ?", changes
            )
            return _append(db, events)

    def get(self, job_id: str, tenant: str | None = None) -> Job | None:
        """The job of this id, if it is this tenant's; None is any."""
        rows = self._rows("SELECT record FROM jobs WHERE id = ? AND tenant = coalesce(?, tenant)", (job_id, tenant))
        return from_record(rows[0][0]) if rows else None

    def active(self) -> list[Job]:
        """All jobs that have not ended, oldest first."""
        marks = ", ".join("?" * len(_ACTIVE))
        rows = self._rows(f"SELECT record FROM jobs WHERE status IN ({marks}) ORDER BY id", _ACTIVE)
        return [from_record(row[0]) for row in rows]

    def find(
        self,
        *,
        tenant: str | None = None,
        status: Status | None = None,
        kind: str | None = None,
        batch_id: str | None = None,
        label: tuple[str, str] | None = None,
        created_after: datetime | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> tuple[list[Job], str | None]:
        """A tenant's jobs, newest first, behind the cursor `after`; and the cursor of the next page, if there is."""
        query, values = search_table.query(
            tenant=tenant,
            status=status,
            kind=kind,
            batch_id=batch_id,
            label=label,
            created_after=created_after,
            after=after,
            limit=limit + 1,
        )
        jobs = [from_record(row[0]) for row in self._rows(query, values)]
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

    def usage(self, tenant: str) -> Usage:
        """What a tenant stores in the data folder, artifacts and blobs, and the limits set for it alone."""
        query = f"SELECT stored_bytes, {LIMITS} FROM tenants WHERE id = ?"
        rows = self._rows(query, (tenant,))
        return Usage(rows[0][0], Limits(*rows[0][1:])) if rows else Usage()

    def statuses(self, job_ids: Sequence[str]) -> dict[str, Status]:
        """Where those of these jobs stand that there are."""
        marks = ", ".join("?" * len(job_ids))
        return {
            id_: Status(status)
            for id_, status in self._rows(f"SELECT id, status FROM jobs WHERE id IN ({marks})", job_ids)
        }

    def compact(self) -> None:
        """Make a database of an earlier version one that gives free space back bit by bit; takes its size once more."""
        with self._lock, database_faults():
            if self._db.execute("PRAGMA auto_vacuum").fetchone()[0] == INCREMENTAL:
                return
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The database for queries, which no other writer holds up."""
        with self._lock, database_faults():
            yield self._db

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The database for some statements that hold together: all of them or none."""
        with self._lock, database_faults():
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
        with self._lock, database_faults():
            return self._db.execute(query, values).fetchall()


def connect(data_dir: Path) -> sqlite3.Connection:
    """A connection to the database of a data folder that a server may hold; for tables that the server only reads.

    The database is made, or brought to this schema, when no server holds it. Raises StorageFailure.
    """
    with storage_faults("opening the data folder"):
        data_dir.mkdir(parents=True, exist_ok=True)
    with database_faults():
        db = _open(data_dir / DATABASE)
        try:
            if _version(db) != len(MIGRATIONS):
                with storage_faults("opening the data folder"), closing(_hold(data_dir / LOCK)):
                    _migrate(db)
        except BaseException:
            db.close()
            raise
    return db


def note_address(data_dir: Path, url: str) -> None:
    """Say in the lock file of a data folder that this process holds where it listens; raises OSError."""
    with (data_dir / LOCK).open("a") as file:
        file.write(f"{url}\n")


def address_of_server(data_dir: Path) -> str | None:
    """Where the server listens that holds a data folder; None when none does.

    Raises StorageFailure when one does that has not said where.
    """
    try:
        with storage_faults("looking at the data folder"):
            _hold(data_dir / LOCK).close()
    except StorageFailure:
        lines = (data_dir / LOCK).read_text().splitlines()
        if len(lines) < 2:
            raise
        return lines[1]
    return None


def _append(db: sqlite3.Connection, events: Sequence[Event]) -> bool:
    rows = [(e.job_id, e.id, e.type, text_of(e.at), json.dumps(e.data, separators=(",", ":"))) for e in events]
    db.executemany("INSERT INTO events (job_id, id, type, at, data) VALUES (?, ?, ?, ?, ?)", rows)
    batch_table.append(db, events)
    return delivery_table.append(db, events)


def _hold(path: Path) -> Any:
    """The open lock file; the lock goes with the process, however it ends."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.readline(32).strip() or "unknown"
        file.close()
        raise StorageFailure(
            f"the data folder is in use by another server (process {owner}): stop it, or choose another --data-dir"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _open(path: Path) -> sqlite3.Connection:
    _keep_from_others(path)
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    # Of a new database: what is deleted can be given back to the disk bit by bit. An old one is told so by `compact`.
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL")
    # In WAL mode a commit then survives the process, and the database a power cut.
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA foreign_keys = ON")
    return db


def _keep_from_others(path: Path) -> None:
    """The database holds secrets that sign: what SQLite puts beside it takes over its mode."""
    with storage_faults("opening the data folder"):
        path.touch(mode=0o600)
        for file in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
            with suppress(FileNotFoundError, PermissionError):
                mode = file.stat().st_mode
                if mode & 0o007:
                    file.chmod(mode & 0o770)


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _migrate(db: sqlite3.Connection, *, as_it_is: bool = False) -> None:
    version = _version(db)
    if version > len(MIGRATIONS):
        db.close()
        raise StorageFailure(
            f"the data folder was written by a newer version of this service (schema {version}, known up to "
            f"{len(MIGRATIONS)}): use that version, or another --data-dir"
        )
    if as_it_is and version < len(MIGRATIONS):
        db.close()
        raise StorageFailure(
            f"the data folder was written by an earlier version of this service (schema {version}, now "
            f"{len(MIGRATIONS)}), and a dry run changes nothing: start the server once, or run without --dry-run"
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")


@contextmanager
def database_faults() -> Iterator[None]:
    """Turn what SQLite raises into DiskFull or StorageFailure."""
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise DiskFull("there was no space left while writing the job database: free some and try again") from error
        raise StorageFailure(f"the job database reported {str(error)!r}") from error


def _stored_bytes(job: Job) -> int:
    """Of the files that lie in the data folder; those written to an address of their own are the user's."""
    return sum(artifact.size_bytes for artifact in job.artifacts if job.is_ours(artifact))


def _kept_since(job: Job) -> str | None:
    """From when the age of an ended job counts; that of a batch's jobs does from the end of the batch."""
    return text_of(job.finished_at) if job.finished_at is not None and job.batch_id is None else None
