"""Batches in the database: statements for a transaction of the store."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from service.jobs.batch import Batch
from service.jobs.events import TERMINAL_EVENTS, Event, Merged
from service.jobs.job import Status
from service.jobs.record import from_record
from service.jobs.times import text_of, time_of

#: Which event of which job an entry of the merged stream is; the event itself is kept with its job.
SCHEMA = """
    CREATE TABLE batches (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        created_at TEXT NOT NULL,
        finished_at TEXT,
        labels TEXT NOT NULL,
        job_ids TEXT NOT NULL
    );
    CREATE INDEX batches_by_tenant ON batches (tenant, id);
    CREATE TABLE batch_events (
        batch_id TEXT NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
        id INTEGER NOT NULL,
        item INTEGER NOT NULL,
        job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        event_id INTEGER NOT NULL,
        PRIMARY KEY (batch_id, id)
    ) WITHOUT ROWID;
    CREATE INDEX batch_events_by_job ON batch_events (job_id);
    ALTER TABLE jobs ADD COLUMN batch_id TEXT;
    CREATE INDEX jobs_by_batch ON jobs (batch_id, id) WHERE batch_id IS NOT NULL;
    CREATE INDEX jobs_of_batch_by_status ON jobs (batch_id, status) WHERE batch_id IS NOT NULL;
"""

_COLUMNS = "id, tenant, labels, job_ids, created_at, finished_at"


def insert(db: sqlite3.Connection, batch: Batch) -> None:
    """Store a new batch; its jobs are stored as all jobs are."""
    labels, job_ids = json.dumps(batch.labels), json.dumps(batch.job_ids)
    row = (batch.id, batch.tenant, labels, job_ids, text_of(batch.created_at))
    db.execute("INSERT INTO batches (id, tenant, labels, job_ids, created_at) VALUES (?, ?, ?, ?, ?)", row)


def append(db: sqlite3.Connection, events: Sequence[Event]) -> None:
    """Store which of these events stand where in the streams of their batches, and which batch has ended by them."""
    merged = [(event, event.merged) for event in events if event.merged is not None]
    rows = [(place.batch_id, place.id, place.index, event.job_id, event.id) for event, place in merged]
    db.executemany("INSERT INTO batch_events (batch_id, id, item, job_id, event_id) VALUES (?, ?, ?, ?, ?)", rows)
    ends = [(text_of(event.at), place.batch_id) for event, place in merged if place.is_last]
    db.executemany("UPDATE batches SET finished_at = ? WHERE id = ?", ends)
    # What is kept of its jobs ages together from now on.
    db.executemany("UPDATE jobs SET kept_since = ? WHERE batch_id = ?", ends)


def get(db: sqlite3.Connection, batch_id: str) -> Batch | None:
    """The batch of this id, with its counts."""
    row = db.execute(f"SELECT {_COLUMNS} FROM batches WHERE id = ?", (batch_id,)).fetchone()
    return _batch(db, row) if row else None


def find(
    db: sqlite3.Connection, *, tenant: str | None, limit: int, after: str | None
) -> tuple[list[Batch], str | None]:
    """Batches, newest first, behind the cursor `after`; and the cursor of the next page, if there is one."""
    given = {condition: value for condition, value in (("tenant = ?", tenant), ("id < ?", after)) if value is not None}
    where = f"WHERE {' AND '.join(given)}" if given else ""
    query = f"SELECT {_COLUMNS} FROM batches {where} ORDER BY id DESC LIMIT ?"
    rows = db.execute(query, (*given.values(), limit + 1)).fetchall()
    return [_batch(db, row) for row in rows[:limit]], rows[limit - 1][0] if len(rows) > limit else None


def events(db: sqlite3.Connection, batch_id: str, *, after: int, limit: int) -> list[Event]:
    """Stored events of all jobs of a batch with larger ids there than `after`, in order; terminal ones with the job."""
    marks = ", ".join("?" * len(TERMINAL_EVENTS))
    rows = db.execute(
        f"""SELECT merged.id, item, merged.job_id, event_id, type, at, data,
                CASE WHEN type IN ({marks}) THEN (SELECT record FROM jobs WHERE id = merged.job_id) END
            FROM batch_events AS merged CROSS JOIN events
                ON events.job_id = merged.job_id AND events.id = merged.event_id
            WHERE batch_id = ? AND merged.id > ? ORDER BY merged.id LIMIT ?""",
        (*TERMINAL_EVENTS, batch_id, after, limit),
    )
    return list(_events(rows, batch_id))


def last_event_id(db: sqlite3.Connection, batch_id: str) -> int:
    """The largest id stored for a batch; 0 when there is none."""
    return int(
        db.execute("SELECT coalesce(max(id), 0) FROM batch_events WHERE batch_id = ?", (batch_id,)).fetchone()[0]
    )


def delete(db: sqlite3.Connection, batch_id: str) -> None:
    """Remove a batch whose jobs are gone."""
    db.execute("DELETE FROM batches WHERE id = ?", (batch_id,))


def _batch(db: sqlite3.Connection, row: tuple[Any, ...]) -> Batch:
    id_, tenant, labels, job_ids, created_at, finished_at = row
    counts = db.execute("SELECT status, count(*) FROM jobs WHERE batch_id = ? GROUP BY status", (id_,))
    return Batch(
        id=id_,
        tenant=tenant,
        labels=json.loads(labels),
        job_ids=tuple(json.loads(job_ids)),
        created_at=datetime.fromisoformat(created_at),
        finished_at=time_of(finished_at),
        counts={Status(status): count for status, count in counts},
    )


def _events(rows: sqlite3.Cursor, batch_id: str) -> Iterator[Event]:
    for id_, item, job_id, event_id, type_, at, data, record in rows:
        job = from_record(record) if record else None
        place = Merged(batch_id, item, id_)
        event = Event(event_id, type_, job_id, datetime.fromisoformat(at), json.loads(data), job, place)
        yield event.in_batch()
