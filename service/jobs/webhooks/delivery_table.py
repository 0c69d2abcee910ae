"""Deliveries in the database: statements for a transaction of the store.

A delivery is stored with the event that it tells of, in one transaction: no event is told that did not happen, and
none that happened is forgotten.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from datetime import datetime

import uuid_utils

from service.jobs.events import Event
from service.jobs.request import WEBHOOK_EVENTS, Webhook
from service.jobs.times import text_of, time_of
from service.jobs.webhooks.addresses import place_of
from service.jobs.webhooks.delivery import GONE, Delivery, DeliveryStatus, Due, Verdict, message

SCHEMA = """
    CREATE TABLE webhook_deliveries (
        id TEXT PRIMARY KEY,
        job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        tenant TEXT NOT NULL,
        event TEXT NOT NULL,
        place TEXT NOT NULL,
        url TEXT NOT NULL,
        body TEXT NOT NULL,
        status TEXT NOT NULL,
        created_at TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        last_status_code INTEGER,
        last_error TEXT,
        next_attempt_at TEXT,
        delivered_at TEXT
    ) WITHOUT ROWID;
    CREATE INDEX webhook_deliveries_by_job ON webhook_deliveries (job_id, id);
    CREATE INDEX webhook_deliveries_due ON webhook_deliveries (next_attempt_at, place, tenant, job_id)
        WHERE status = 'pending';
"""

_SHOWN = "id, event, status, created_at, attempts, last_status_code, last_error, next_attempt_at, delivered_at"
_WAITING = "webhook_deliveries INDEXED BY webhook_deliveries_due WHERE status = 'pending'"


def append(db: sqlite3.Connection, events: Sequence[Event]) -> bool:
    """Store a delivery for each event that its job's webhook asks for; the jobs are stored. Whether there are any."""
    added = [_add(db, event) for event in events if event.type in WEBHOOK_EVENTS]
    return any(added)


def due(
    db: sqlite3.Connection,
    now: datetime,
    *,
    jobs: Collection[str],
    places: Collection[str],
    tenants: Collection[str],
    limit: int,
) -> list[Due]:
    """Deliveries whose time has come, longest waiting first, but those of these jobs, places and tenants."""
    query = f"""SELECT id, job_id, tenant, place, url, body, attempts FROM {_WAITING} AND next_attempt_at <= ?
        AND job_id NOT IN ({_marks(jobs)}) AND place NOT IN ({_marks(places)}) AND tenant NOT IN ({_marks(tenants)})
        ORDER BY next_attempt_at, id LIMIT ?"""
    rows = db.execute(query, (text_of(now), *jobs, *places, *tenants, limit))
    return [Due(id_, job, tenant, place, url, body.encode(), n) for id_, job, tenant, place, url, body, n in rows]


def next_time(db: sqlite3.Connection, now: datetime) -> datetime | None:
    """When the first delivery is due that was not due by `now`."""
    query = f"SELECT min(next_attempt_at) FROM {_WAITING} AND next_attempt_at > ?"
    return time_of(db.execute(query, (text_of(now),)).fetchone()[0])


def pending(db: sqlite3.Connection) -> int:
    """How many deliveries have not ended."""
    return int(db.execute(f"SELECT count(*) FROM {_WAITING}").fetchone()[0])


def settle(db: sqlite3.Connection, delivery: Due, verdict: Verdict) -> None:
    """Store what came of an attempt; behind a 410 nothing more goes out for the job."""
    answer = verdict.answer
    db.execute(
        "UPDATE webhook_deliveries SET status = ?, attempts = ?, last_status_code = ?, last_error = ?,"
        " next_attempt_at = ?, delivered_at = ? WHERE id = ?",
        (
            verdict.status,
            delivery.attempts + 1,
            answer.status_code,
            answer.error,
            verdict.next_attempt_at and text_of(verdict.next_attempt_at),
            text_of(verdict.at) if verdict.status is DeliveryStatus.DELIVERED else None,
            delivery.id,
        ),
    )
    if verdict.is_gone:
        db.execute(
            "UPDATE webhook_deliveries SET status = ?, next_attempt_at = NULL WHERE job_id = ? AND status = ?",
            (DeliveryStatus.SKIPPED, delivery.job_id, DeliveryStatus.PENDING),
        )


def postpone(db: sqlite3.Connection, delivery: Due, until: datetime) -> None:
    """Have a delivery wait for an attempt that could not be made."""
    db.execute("UPDATE webhook_deliveries SET next_attempt_at = ? WHERE id = ?", (text_of(until), delivery.id))


def of_job(db: sqlite3.Connection, job_id: str, limit: int) -> list[Delivery]:
    """The newest deliveries of a job, oldest first."""
    query = f"SELECT {_SHOWN} FROM webhook_deliveries WHERE job_id = ? ORDER BY id DESC LIMIT ?"
    rows = db.execute(query, (job_id, limit)).fetchall()
    return [
        Delivery(
            id=id_,
            event=event,
            status=DeliveryStatus(status),
            created_at=datetime.fromisoformat(created_at),
            attempts=attempts,
            last_status_code=last_status_code,
            last_error=last_error,
            next_attempt_at=time_of(next_attempt_at),
            delivered_at=time_of(delivered_at),
        )
        for id_, event, status, created_at, attempts, last_status_code, last_error, next_attempt_at, delivered_at in (
            reversed(rows)
        )
    ]


def _add(db: sqlite3.Connection, event: Event) -> bool:
    query = """SELECT
            tenant, batch_id, json_extract(record, '$.batch_index'), json_extract(record, '$.request.webhook'),
            EXISTS (SELECT 1 FROM webhook_deliveries WHERE job_id = jobs.id AND last_status_code = ?)
        FROM jobs WHERE id = ?"""
    row = db.execute(query, (GONE, event.job_id)).fetchone()
    if row is None or row[3] is None:
        return False
    tenant, batch_id, batch_index, asked, is_gone = row
    webhook = Webhook.model_validate_json(asked)
    if event.type not in webhook.events:
        return False
    at = text_of(event.at)
    status = DeliveryStatus.SKIPPED if is_gone else DeliveryStatus.PENDING
    values = (
        f"msg_{uuid_utils.uuid7()}",
        event.job_id,
        tenant,
        event.type,
        place_of(webhook.url),
        webhook.url,
        message(event, batch_id, batch_index),
        status,
        at,
        None if is_gone else at,
    )
    columns = "id, job_id, tenant, event, place, url, body, status, created_at, next_attempt_at"
    db.execute(f"INSERT INTO webhook_deliveries ({columns}) VALUES ({_marks(values)})", values)
    return True


def _marks(values: Collection[object]) -> str:
    return ", ".join("?" * len(values))
