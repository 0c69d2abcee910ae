"""API keys and what each tenant may use, in the job database.

A key is `aq_<id>_<secret>`: 256 random bits behind a public id. The database holds its SHA-256; a slow hash guards
passwords, which can be guessed, and would only slow down each call here. Commands open the database beside a running
server, which sees their changes with its next look.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from service.errors import InvalidConfig, NotFound, Unauthorized
from service.jobs.quotas import Limits
from service.jobs.side_connection import SideConnection
from service.jobs.store import LIMITS
from service.jobs.tenant import check_tenant
from service.jobs.times import now_text, text_of, time_of

PREFIX = "aq"
#: Longer than any key: nobody has the server hash megabytes.
MAX_KEY_CHARS = 200
#: Compared with when a key's id is unknown, so that the answer takes as long.
_NO_DIGEST = bytes(32)


class Scope(StrEnum):
    """What a key is good for."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """All that is known of a key but the key itself. `requests_per_minute` comes on top of the tenant's."""

    id: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    requests_per_minute: int | None = None

    def check_usable(self) -> None:
        """Raise Unauthorized when the key was revoked or has expired."""
        if self.revoked_at is not None:
            raise Unauthorized(f"key {self.id} was revoked: ask the operator for another")
        if self.expires_at is not None and self.expires_at <= datetime.now(UTC):
            raise Unauthorized(f"key {self.id} expired at {self.expires_at.isoformat()}: ask the operator for another")


class ApiKeys(SideConnection):
    """The keys of one data folder."""

    def create(
        self,
        tenant: str,
        scopes: Collection[Scope],
        *,
        name: str = "",
        expires_at: datetime | None = None,
        requests_per_minute: int | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key, and its text, which is kept nowhere; raises InvalidConfig."""
        check_tenant(tenant)
        if not scopes:
            raise InvalidConfig("a key without scopes is good for nothing: give it read, submit or admin")
        now = datetime.now(UTC)
        if expires_at is not None and expires_at <= now:
            raise InvalidConfig(f"{expires_at.isoformat()} is over: a key expires in the future, or never")
        id_ = f"key{secrets.token_hex(8)}"
        key = ApiKey(id_, tenant, name, frozenset(scopes), now, expires_at, None, requests_per_minute)
        text = f"{PREFIX}_{id_}_{secrets.token_urlsafe(32)}"
        row = (
            id_,
            tenant,
            name,
            _digest(text),
            " ".join(sorted(scopes)),
            text_of(now),
            expires_at and text_of(expires_at),
            requests_per_minute,
        )
        self._rows(
            "INSERT INTO api_keys (id, tenant, name, digest, scopes, created_at, expires_at, requests_per_minute)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )
        return key, text

    def all(self, tenant: str | None = None) -> list[ApiKey]:
        """Every key of a tenant, or of all, oldest first; those revoked and expired as well."""
        query = f"SELECT {_COLUMNS} FROM api_keys WHERE tenant = coalesce(?, tenant) ORDER BY created_at"
        return [_key(row) for row in self._rows(query, (tenant,))]

    def revoke(self, key_id: str) -> ApiKey:
        """End a key for good; one that was revoked before stays as it is. Raises NotFound."""
        now = now_text()
        self._rows("UPDATE api_keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (now, key_id))
        rows = self._rows(f"SELECT {_COLUMNS} FROM api_keys WHERE id = ?", (key_id,))
        if not rows:
            raise NotFound(f"there is no key {key_id!r}: `arrowquant keys list` names all")
        return _key(rows[0])

    def has_usable(self) -> bool:
        """Whether any key would be let in now."""
        now = now_text()
        query = "SELECT 1 FROM api_keys WHERE revoked_at IS NULL AND coalesce(expires_at > ?, TRUE) LIMIT 1"
        return bool(self._rows(query, (now,)))

    def verify(self, text: str) -> tuple[ApiKey, Limits]:
        """The key of this text, with the overrides for its tenant; raises Unauthorized."""
        rows = self._rows(
            f"SELECT digest, {LIMITS}, {_COLUMNS_OF_KEYS} FROM api_keys LEFT JOIN tenants ON tenants.id = tenant"
            " WHERE api_keys.id = ?",
            (_id_in(text),),
        )
        stored = rows[0][0] if rows else _NO_DIGEST
        if not hmac.compare_digest(_digest(text), stored):
            raise Unauthorized("the key is not known here: check that it is whole, and that it is for this server")
        key = _key(rows[0][4:])
        key.check_usable()
        return key, Limits(*rows[0][1:4])

    def limits(self, tenant: str) -> Limits:
        """The overrides for a tenant."""
        rows = self._rows(f"SELECT {LIMITS} FROM tenants WHERE tenants.id = ?", (tenant,))
        return Limits(*rows[0]) if rows else Limits()

    def set_limits(self, tenant: str, limits: Limits) -> None:
        """Replace the overrides for a tenant; raises InvalidConfig."""
        check_tenant(tenant)
        values = (limits.max_open_jobs, limits.max_stored_bytes, limits.requests_per_minute)
        self._rows(
            "INSERT INTO tenants (id, max_open_jobs, max_stored_bytes, requests_per_minute) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET max_open_jobs = excluded.max_open_jobs,"
            " max_stored_bytes = excluded.max_stored_bytes, requests_per_minute = excluded.requests_per_minute",
            (tenant, *values),
        )


_NAMES = ("id", "tenant", "name", "scopes", "created_at", "expires_at", "revoked_at", "requests_per_minute")
_COLUMNS = ", ".join(_NAMES)
_COLUMNS_OF_KEYS = ", ".join(f"api_keys.{name}" for name in _NAMES)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text[:MAX_KEY_CHARS].encode()).digest()


def _id_in(text: str) -> str:
    """The id that a key names; none names the empty one."""
    prefix, _, rest = text.partition("_")
    return rest.partition("_")[0] if prefix == PREFIX and len(text) <= MAX_KEY_CHARS else ""


def _key(row: tuple[Any, ...]) -> ApiKey:
    id_, tenant, name, scopes, created_at, expires_at, revoked_at, requests_per_minute = row
    return ApiKey(
        id_,
        tenant,
        name,
        frozenset(Scope(scope) for scope in scopes.split()),
        datetime.fromisoformat(created_at),
        time_of(expires_at),
        time_of(revoked_at),
        requests_per_minute,
    )
