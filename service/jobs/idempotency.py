"""Idempotency keys: a call that comes twice is carried out once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

from service.errors import IdempotencyKeyInFlight, IdempotencyKeyReused

#: How long a key and what was answered are kept.
KEPT_FOR = timedelta(hours=24)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Key:
    """What a client calls its call. `digest` is of all that it asks for; keys of two tenants are never the same."""

    tenant: str
    text: str
    digest: str


@dataclass(frozen=True, slots=True)
class Kept:
    """What a key was used for, and what was answered, in the words of whoever answered."""

    digest: str
    answer: str


@dataclass(frozen=True, slots=True)
class Once(Generic[T]):
    """Has the answer to what is made stored with it, in one transaction."""

    key: Key
    answer: Callable[[T], str]


class Keys:
    """Which calls are in flight, and what was answered to those before; everything on the event loop."""

    def __init__(
        self, find: Callable[[Key], Awaitable[Kept | None]], replace: Callable[[Key, str], Awaitable[None]]
    ) -> None:
        """`find` gives what is stored for a key, `replace` stores another answer for one that is there."""
        self.replace = replace
        self._find = find
        self._in_flight: set[tuple[str, str]] = set()

    @asynccontextmanager
    async def claim(self, key: Key | None) -> AsyncGenerator[str | None, None]:
        """Hold a key while its call is carried out; gives the answer instead where there has been one.

        Raises IdempotencyKeyInFlight while another call holds it, and IdempotencyKeyReused when it
        was for something else.
        """
        if key is None:
            yield None
            return
        if (answer := await self._look(key)) is not None:
            yield answer
            return
        self._check_free(key)
        name = (key.tenant, key.text)
        self._in_flight.add(name)
        try:
            # Once more: another call may have been carried out between the look and the claim.
            yield await self._answer(key)
        finally:
            self._in_flight.remove(name)

    async def _look(self, key: Key) -> str | None:
        self._check_free(key)
        return await self._answer(key)

    def _check_free(self, key: Key) -> None:
        if (key.tenant, key.text) in self._in_flight:
            raise IdempotencyKeyInFlight(
                f"the first call with the key {key.text!r} is not answered yet: send this one again in a moment"
            )

    async def _answer(self, key: Key) -> str | None:
        kept = await self._find(key)
        if kept is None:
            return None
        if kept.digest != key.digest:
            raise IdempotencyKeyReused(
                f"the key {key.text!r} belongs to a call with another body or address: make a new key for this one"
            )
        return kept.answer
