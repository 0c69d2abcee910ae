"""How commands show what they keep of keys and secrets: as a JSON document, or in a word."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Protocol


class Dated(Protocol):
    """What can end, by being revoked or with time."""

    @property
    def expires_at(self) -> datetime | None:
        """When it ends by itself."""

    @property
    def revoked_at(self) -> datetime | None:
        """When it was ended."""


def document(record: Any) -> dict[str, Any]:
    """The fields of a dataclass that are there, as JSON takes them."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: _plain(value) for name, value in values.items() if value not in (None, "")}


def state(record: Dated, word: str) -> str:
    """Whether and until when it is good; `word` says for what."""
    if record.revoked_at is not None:
        return f"revoked {record.revoked_at:%Y-%m-%d %H:%M}"
    if record.expires_at is None:
        return word
    now = f"{word} until" if record.expires_at > datetime.now(UTC) else "expired"
    return f"{now} {record.expires_at:%Y-%m-%d %H:%M}"


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return sorted(value) if isinstance(value, frozenset) else value
