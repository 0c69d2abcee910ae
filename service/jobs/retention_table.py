"""What is old, and how it goes, in the database: statements for a transaction of the store.

A job's row knows since when its age counts (`kept_since`: NULL as long as the job or its batch has not ended), whether
it has artifacts (`stored_bytes`) and its whole log (`has_log`). Files go after the row that listed them has changed:
what is still to be removed stands in `removals`, so that no crash forgets it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from datetime import datetime

from service.jobs.job import Status
from service.jobs.record import with_time
from service.jobs.retention import Due

_ENDED = ", ".join(f"'{status}'" for status in Status if status.is_terminal)

SCHEMA = f"""
    ALTER TABLE jobs ADD COLUMN kept_since TEXT;
    ALTER TABLE jobs ADD COLUMN has_log INTEGER NOT NULL DEFAULT 1;
    UPDATE jobs SET kept_since = CASE
        WHEN batch_id IS NOT NULL THEN (SELECT finished_at FROM batches WHERE id = jobs.batch_id)
        WHEN json_valid(record) THEN json_extract(record, '$.finished_at')
        ELSE created_at END
    WHERE status IN ({_ENDED});
    CREATE INDEX jobs_by_age ON jobs (kept_since, id) WHERE kept_since IS NOT NULL;
    CREATE INDEX jobs_with_artifacts ON jobs (kept_since, id) WHERE stored_bytes > 0;
    CREATE INDEX jobs_with_log ON jobs (kept_since, id) WHERE has_log = 1 AND kept_since IS NOT NULL;
    CREATE INDEX batches_by_end ON batches (finished_at) WHERE finished_at IS NOT NULL;
    CREATE TABLE removals (
        job_id TEXT PRIMARY KEY,
        keeps_report INTEGER NOT NULL
    ) WITHOUT ROWID;
"""

#: What a row takes beside its text, with its keys and their indices: about.
ROW_BYTES = 200
#: Behind nothing: where a search begins.
START = ("", "")
Cursor = tuple[str, str]


# --- what is old ---


def old_jobs(db: sqlite3.Connection, before: str, after: Cursor, limit: int) -> list[Due]:
    """Jobs that ended before a time and whose webhook has been told all there is, oldest first."""
    return _old(db, "jobs_by_age", "kept_since IS NOT NULL", before, after, limit)


def old_artifacts(db: sqlite3.Connection, before: str, after: Cursor, limit: int) -> list[Due]:
    """Of these, the ones with files in the data folder."""
    return _old(db, "jobs_with_artifacts", "stored_bytes > 0", before, after, limit)


def old_logs(db: sqlite3.Connection, before: str, after: Cursor, limit: int) -> list[Due]:
    """Of these, the ones with all their events."""
    return _old(db, "jobs_with_log", "has_log = 1 AND kept_since IS NOT NULL", before, after, limit)


def total_bytes(db: sqlite3.Connection) -> int:
    """Of all tenants' artifacts and blobs, and of the database without what is free in it."""
    stored = int(db.execute("SELECT coalesce(sum(stored_bytes), 0) FROM tenants").fetchone()[0])
    return stored + own_bytes(db)


def own_bytes(db: sqlite3.Connection) -> int:
    """Of the database: records, logs and all else. What is free in it is used again, or given back."""
    pages, free, size = (
        int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def log_bytes(db: sqlite3.Connection, job_id: str) -> int:
    """About how much of the database a job's events take but for the last one."""
    query = f"SELECT coalesce(sum(length(data) + {ROW_BYTES}), 0), max(length(data)) FROM events WHERE job_id = ?"
    total, last = db.execute(query, (job_id,)).fetchone()
    return max(0, int(total) - int(last or 0) - ROW_BYTES)


def record_bytes(db: sqlite3.Connection, job_id: str) -> int:
    """About how much of the database a job's record takes."""
    row = db.execute("SELECT length(record) FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return int(row[0]) + ROW_BYTES if row else 0


def _old(db: sqlite3.Connection, index: str, condition: str, before: str, after: Cursor, limit: int) -> list[Due]:
    rows = db.execute(
        f"""SELECT kept_since, tenant, id, stored_bytes, batch_id FROM jobs INDEXED BY {index}
            WHERE {condition} AND kept_since < ? AND (kept_since, id) > (?, ?) AND NOT EXISTS
                (SELECT 1 FROM webhook_deliveries WHERE job_id = jobs.id AND status = 'pending')
            ORDER BY kept_since, id LIMIT ?""",
        (before, *after, limit),
    )
    return [Due(*row) for row in rows]


# --- how it goes ---


def expire_artifacts(db: sqlite3.Connection, job_id: str, now: datetime) -> None:
    """Have a job list its files no longer; they are then to be removed."""
    row = db.execute("SELECT record FROM jobs WHERE id = ? AND stored_bytes > 0", (job_id,)).fetchone()
    if row is None:
        return
    record = with_time(row[0], "artifacts_expired_at", now)
    db.execute("UPDATE jobs SET stored_bytes = 0, record = ? WHERE id = ?", (record, job_id))
    db.execute("INSERT OR IGNORE INTO removals (job_id, keeps_report) VALUES (?, 1)", (job_id,))


def trim_log(db: sqlite3.Connection, job_id: str, now: datetime, limit: int) -> bool:
    """Delete at most `limit` of an ended job's events, but never the last one; whether there are more to delete."""
    last = db.execute("SELECT max(id) FROM events WHERE job_id = ?", (job_id,)).fetchone()[0] or 0
    has_more = not _delete_events(db, job_id, last, limit)
    _note_trimmed(db, job_id, now, has_more)
    return has_more


def erase(db: sqlite3.Connection, job_id: str, now: datetime, limit: int) -> bool:
    """Delete an ended job with all that belongs to it, of a long log `limit` events; whether there is more to delete.

    Its files are then to be removed.
    """
    if not _delete_events(db, job_id, None, limit):
        _note_trimmed(db, job_id, now, True)
        return True
    if db.execute("DELETE FROM jobs WHERE id = ?", (job_id,)).rowcount:
        db.execute("INSERT OR REPLACE INTO removals (job_id, keeps_report) VALUES (?, 0)", (job_id,))
    return False


def drop_empty_batches(db: sqlite3.Connection, before: str, taken: Iterable[str], limit: int) -> int:
    """Delete batches that ended before a time and of which no job is left; how many."""
    rows = db.execute(
        """SELECT id FROM batches INDEXED BY batches_by_end WHERE finished_at < ?
            AND NOT EXISTS (SELECT 1 FROM jobs WHERE batch_id = batches.id) LIMIT ?""",
        (before, limit),
    ).fetchall()
    ids = [row for row in rows if row[0] not in set(taken)]
    db.executemany("DELETE FROM batches WHERE id = ?", ids)
    return len(ids)


# --- files that nothing lists any more ---


def removals(db: sqlite3.Connection, job_ids: Sequence[str]) -> dict[str, bool]:
    """Which of these jobs have files to be removed, and whether their reports stay."""
    query = "SELECT job_id, keeps_report FROM removals WHERE job_id = ?"
    rows = (db.execute(query, (job_id,)).fetchone() for job_id in job_ids)
    return {row[0]: bool(row[1]) for row in rows if row is not None}


def all_removals(db: sqlite3.Connection, after: str, limit: int) -> dict[str, bool]:
    """As `removals`, of whatever job behind `after`."""
    query = "SELECT job_id, keeps_report FROM removals WHERE job_id > ? ORDER BY job_id LIMIT ?"
    return {row[0]: bool(row[1]) for row in db.execute(query, (after, limit))}


def forget_removals(db: sqlite3.Connection, gone: dict[str, bool]) -> None:
    """Note that these files are gone; a report that is to go since then is not."""
    db.executemany("DELETE FROM removals WHERE job_id = ? AND keeps_report = ?", gone.items())


def _delete_events(db: sqlite3.Connection, job_id: str, last: int | None, limit: int) -> bool:
    """Delete at most `limit` of a job's events before `last`, None for all; whether nothing is left of them."""
    bound = (1 << 63) - 1 if last is None else last
    query = "SELECT id FROM events WHERE job_id = ? AND id < ? ORDER BY id LIMIT ?"
    ids = [row[0] for row in db.execute(query, (job_id, bound, limit))]
    if not ids:
        return True
    db.execute("DELETE FROM events WHERE job_id = ? AND id <= ?", (job_id, ids[-1]))
    # A batch has its jobs' events in their own order, so these are the same ones.
    db.execute(
        """DELETE FROM batch_events WHERE (batch_id, id) IN (SELECT batch_id, id FROM
            (SELECT batch_id, id, event_id FROM batch_events WHERE job_id = ? ORDER BY batch_id, id LIMIT ?)
            WHERE event_id <= ?)""",
        (job_id, len(ids), ids[-1]),
    )
    return len(ids) < limit


def _note_trimmed(db: sqlite3.Connection, job_id: str, now: datetime, has_more: bool) -> None:
    """Have a job tell that its log lacks something, also as long as there is more to delete."""
    row = db.execute("SELECT record FROM jobs WHERE id = ? AND has_log = 1", (job_id,)).fetchone()
    if row is not None:
        record = with_time(row[0], "events_expired_at", now)
        db.execute("UPDATE jobs SET has_log = ?, record = ? WHERE id = ?", (int(has_more), record, job_id))
