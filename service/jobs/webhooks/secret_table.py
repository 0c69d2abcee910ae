"""Signing secrets in the database. They are kept as they are, since each signature takes the secret itself."""

from __future__ import annotations

import sqlite3
from datetime import datetime

from service.jobs.times import now_text, text_of

SCHEMA = """
    CREATE TABLE webhook_secrets (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        secret BLOB,
        created_at TEXT NOT NULL,
        expires_at TEXT,
        revoked_at TEXT
    ) WITHOUT ROWID;
    CREATE INDEX webhook_secrets_by_tenant ON webhook_secrets (tenant, created_at);
"""

_USABLE = "tenant = ? AND revoked_at IS NULL AND coalesce(expires_at > ?, TRUE)"


def usable(db: sqlite3.Connection, tenant: str) -> list[bytes]:
    """What signs a tenant's messages now, newest first."""
    query = f"SELECT secret FROM webhook_secrets WHERE {_USABLE} ORDER BY created_at DESC"
    return [row[0] for row in db.execute(query, (tenant, now_text()))]


def insert(db: sqlite3.Connection, id_: str, tenant: str, secret: bytes) -> None:
    """Store a new secret."""
    row = (id_, tenant, secret, now_text())
    db.execute("INSERT INTO webhook_secrets (id, tenant, secret, created_at) VALUES (?, ?, ?, ?)", row)


def expire_others(db: sqlite3.Connection, id_: str, tenant: str, expires_at: datetime) -> None:
    """Have all usable secrets of a tenant but one expire by then, unless they do so before."""
    text = text_of(expires_at)
    db.execute(
        f"UPDATE webhook_secrets SET expires_at = min(coalesce(expires_at, ?), ?) WHERE {_USABLE} AND id <> ?",
        (text, text, tenant, now_text(), id_),
    )


def revoke(db: sqlite3.Connection, id_: str) -> None:
    """End a secret for good; one that was revoked before stays as it is."""
    db.execute("UPDATE webhook_secrets SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (now_text(), id_))


def wipe_unusable(db: sqlite3.Connection) -> None:
    """Forget what ended secrets were."""
    db.execute(
        "UPDATE webhook_secrets SET secret = NULL WHERE secret IS NOT NULL"
        " AND (revoked_at IS NOT NULL OR expires_at <= ?)",
        (now_text(),),
    )
