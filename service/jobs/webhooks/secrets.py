"""The signing secrets of tenants, as the operator's commands make and revoke them, also beside a running server."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from service.errors import InvalidConfig, NotFound
from service.jobs.side_connection import SideConnection
from service.jobs.store import database_faults
from service.jobs.tenant import check_tenant
from service.jobs.times import time_of
from service.jobs.webhooks import secret_table
from service.jobs.webhooks.signing import new_secret, secret_text

#: Each makes the header of a message longer, and rotation takes two.
MAX_USABLE = 5
_COLUMNS = "id, tenant, created_at, expires_at, revoked_at"


@dataclass(frozen=True, slots=True)
class SigningSecret:
    """All that is shown of a secret after it was made."""

    id: str
    tenant: str
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class SigningSecrets(SideConnection):
    """The secrets of one data folder."""

    def create(self, tenant: str, *, others_expire_at: datetime | None = None) -> tuple[SigningSecret, str]:
        """A new secret, and its text, which is shown to nobody again; the tenant's others sign on beside it.

        They do so for good, or until `others_expire_at`. Raises InvalidConfig.
        """
        check_tenant(tenant)
        id_, secret = f"sec{secrets.token_hex(8)}", new_secret()
        with self._transaction() as db:
            if len(secret_table.usable(db, tenant)) >= MAX_USABLE:
                raise InvalidConfig(
                    f"tenant {tenant} has {MAX_USABLE} secrets, and all of them sign: revoke one, "
                    "`arrowquant webhooks secret list` names them"
                )
            secret_table.insert(db, id_, tenant, secret)
            if others_expire_at is not None:
                secret_table.expire_others(db, id_, tenant, others_expire_at)
        return self._get(id_), secret_text(secret)

    def all(self, tenant: str | None = None) -> list[SigningSecret]:
        """Every secret of a tenant, or of all, oldest first; those revoked and expired as well."""
        query = f"SELECT {_COLUMNS} FROM webhook_secrets WHERE tenant = coalesce(?, tenant) ORDER BY created_at"
        return [_secret(row) for row in self._rows(query, (tenant,))]

    def revoke(self, secret_id: str) -> SigningSecret:
        """End a secret for good; raises NotFound."""
        with self._transaction() as db:
            secret_table.revoke(db, secret_id)
        return self._get(secret_id)

    def _get(self, id_: str) -> SigningSecret:
        rows = self._rows(f"SELECT {_COLUMNS} FROM webhook_secrets WHERE id = ?", (id_,))
        if not rows:
            raise NotFound(f"there is no secret {id_!r}: `arrowquant webhooks secret list` names all")
        return _secret(rows[0])

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, database_faults():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                secret_table.wipe_unusable(self._db)
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")


def _secret(row: tuple[Any, ...]) -> SigningSecret:
    id_, tenant, created_at, expires_at, revoked_at = row
    return SigningSecret(
        id_,
        tenant,
        datetime.fromisoformat(created_at),
        time_of(expires_at),
        time_of(revoked_at),
    )
