"""Whose the blobs are, in the database: statements for a transaction of the store."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from service.jobs.retention import Due
from service.jobs.times import now_text

#: What a file takes at least, so that no quota is evaded by millions of tiny ones.
MIN_BYTES = 4096

SCHEMA = f"""
    CREATE TABLE blobs (
        tenant TEXT NOT NULL,
        digest TEXT NOT NULL,
        size INTEGER NOT NULL,
        created_at TEXT NOT NULL,
        last_used_at TEXT NOT NULL,
        PRIMARY KEY (tenant, digest)
    ) WITHOUT ROWID;
    CREATE INDEX blobs_by_digest ON blobs (digest);
    CREATE INDEX blobs_by_use ON blobs (last_used_at);
    CREATE TRIGGER count_new_blob AFTER INSERT ON blobs BEGIN
        INSERT INTO tenants (id, stored_bytes) VALUES (new.tenant, max(new.size, {MIN_BYTES}))
            ON CONFLICT (id) DO UPDATE SET stored_bytes = stored_bytes + excluded.stored_bytes;
    END;
    CREATE TRIGGER count_deleted_blob AFTER DELETE ON blobs BEGIN
        UPDATE tenants SET stored_bytes = stored_bytes - max(old.size, {MIN_BYTES}) WHERE id = old.tenant;
    END;
"""


def add(db: sqlite3.Connection, tenant: str, digest: str, size: int) -> None:
    """Note that a tenant has sent a blob; harmless when it had."""
    now = now_text()
    row = (tenant, digest, size, now, now)
    db.execute(
        "INSERT OR IGNORE INTO blobs (tenant, digest, size, created_at, last_used_at) VALUES (?, ?, ?, ?, ?)", row
    )


def use(db: sqlite3.Connection, tenant: str, digests: Iterable[str]) -> dict[str, int]:
    """The sizes of those blobs that the tenant has, which are marked as used now."""
    now = now_text()
    query = "UPDATE blobs SET last_used_at = ? WHERE tenant = ? AND digest = ? RETURNING size"
    rows = [(digest, db.execute(query, (now, tenant, digest)).fetchone()) for digest in digests]
    return {digest: int(row[0]) for digest, row in rows if row is not None}


def forget(db: sqlite3.Connection, tenant: str, digest: str) -> None:
    """A tenant has a blob no longer."""
    db.execute("DELETE FROM blobs WHERE tenant = ? AND digest = ?", (tenant, digest))


def unused(db: sqlite3.Connection, before: str, after: tuple[str, str, str], limit: int) -> list[Due]:
    """What was last used before a time, behind `after` (time, tenant, digest), least recently used first."""
    rows = db.execute(
        """SELECT last_used_at, tenant, digest, max(size, ?) FROM blobs INDEXED BY blobs_by_use
            WHERE last_used_at < ? AND (last_used_at, tenant, digest) > (?, ?, ?)
            ORDER BY last_used_at, tenant, digest LIMIT ?""",
        (MIN_BYTES, before, *after, limit),
    )
    return [Due(*row) for row in rows]


def drop(db: sqlite3.Connection, tenant: str, digest: str, before: str) -> bool:
    """Take a blob from a tenant who has not used it since; whether it did."""
    query = "DELETE FROM blobs WHERE tenant = ? AND digest = ? AND last_used_at < ?"
    return db.execute(query, (tenant, digest, before)).rowcount > 0


def tenants(db: sqlite3.Connection, digest: str) -> list[str]:
    """Who has a blob."""
    return [row[0] for row in db.execute("SELECT tenant FROM blobs WHERE digest = ?", (digest,)).fetchall()]


def stored(db: sqlite3.Connection, tenant: str) -> tuple[int, int | None]:
    """Bytes that a tenant has stored, artifacts included, and how many it may where that was set for it alone."""
    row = db.execute("SELECT stored_bytes, max_stored_bytes FROM tenants WHERE id = ?", (tenant,)).fetchone()
    return (int(row[0]), row[1]) if row else (0, None)


def totals(db: sqlite3.Connection) -> tuple[int, int, int]:
    """How many files are stored, their bytes, and how many bytes count as somebody's because of them."""
    files, nbytes = db.execute(
        "SELECT count(*), coalesce(sum(size), 0) FROM (SELECT max(size) AS size FROM blobs GROUP BY digest)"
    ).fetchone()
    counted = db.execute(f"SELECT coalesce(sum(max(size, {MIN_BYTES})), 0) FROM blobs").fetchone()[0]
    return files, nbytes, counted
