"""Idempotency keys in the database: statements for a transaction of the store."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime

from service.jobs.idempotency import KEPT_FOR, Kept, Key
from service.jobs.times import now_text, text_of

SCHEMA = """
    CREATE TABLE idempotency_keys (
        tenant TEXT NOT NULL,
        key TEXT NOT NULL,
        digest TEXT NOT NULL,
        created_at TEXT NOT NULL,
        answer TEXT NOT NULL,
        PRIMARY KEY (tenant, key)
    ) WITHOUT ROWID;
    CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
"""


def keep(db: sqlite3.Connection, key: Key, answer: str) -> None:
    """Store the answer to a call; fails on a key that is kept already, so nothing is made twice."""
    remove_expired(db)
    row = (key.tenant, key.text, key.digest, now_text(), answer)
    db.execute("INSERT INTO idempotency_keys (tenant, key, digest, created_at, answer) VALUES (?, ?, ?, ?, ?)", row)


def replace(db: sqlite3.Connection, key: Key, answer: str) -> None:
    """Store what was answered in the end, where the call waited."""
    db.execute("UPDATE idempotency_keys SET answer = ? WHERE tenant = ? AND key = ?", (answer, key.tenant, key.text))


def find(db: sqlite3.Connection, key: Key) -> Kept | None:
    """What a key was used for, unless that is too long ago."""
    row = db.execute(
        "SELECT digest, answer FROM idempotency_keys WHERE tenant = ? AND key = ? AND created_at > ?",
        (key.tenant, key.text, _expired()),
    ).fetchone()
    return Kept(*row) if row else None


def remove_expired(db: sqlite3.Connection) -> None:
    """Forget the keys that are too old."""
    db.execute("DELETE FROM idempotency_keys WHERE created_at <= ?", (_expired(),))


def _expired() -> str:
    return text_of(datetime.now(UTC) - KEPT_FOR)
