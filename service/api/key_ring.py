"""The keys that were seen lately, so that a call seldom waits for the database."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from service.errors import NotReady
from service.jobs.api_keys import ApiKey, ApiKeys
from service.jobs.quotas import Limits

#: How long a key is taken for what it was; one that is revoked meanwhile is let in no longer.
HOLD_S = 0.5
#: More than are held at once without a look at which are over.
MANY = 1000
THREADS = 4


@dataclass(frozen=True, slots=True)
class _Held:
    key: ApiKey
    limits: Limits
    until: float


class KeyRing:
    """Looks keys up. On one event loop."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._keys: ApiKeys | None = None
        self._held: dict[bytes, _Held] = {}
        self._threads = CapacityLimiter(THREADS)

    async def open(self) -> None:
        """Open the database; raises StorageFailure."""
        self._keys = await run_sync(ApiKeys, self._data_dir)

    def close(self) -> None:
        """Close the database, if it is open."""
        if self._keys is not None:
            self._keys.close()

    async def verify(self, text: str) -> tuple[ApiKey, Limits]:
        """The key of this text, and the overrides for its tenant; raises Unauthorized.

        What is held is found by its SHA-256, never by the text, so that the time of a look tells nothing of a key.
        """
        digest = hashlib.sha256(text.encode()).digest()
        held = self._held.get(digest)
        if held is None or held.until < time.monotonic():
            self._held.pop(digest, None)
            held = self._hold(digest, *await self._look_up(text))
        held.key.check_usable()
        return held.key, held.limits

    async def _look_up(self, text: str) -> tuple[ApiKey, Limits]:
        if self._keys is None:
            raise NotReady("the server is starting: try again in a moment")
        return await run_sync(self._keys.verify, text, limiter=self._threads)

    def _hold(self, digest: bytes, key: ApiKey, limits: Limits) -> _Held:
        now = time.monotonic()
        if len(self._held) >= MANY:
            self._held = {known: held for known, held in self._held.items() if held.until >= now}
        self._held[digest] = _Held(key, limits, now + HOLD_S)
        return self._held[digest]
