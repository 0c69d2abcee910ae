"""Looks host names up off the event loop, and lets none through that leads where webhooks may not go."""

from __future__ import annotations

import asyncio
import socket

from service.errors import WebhookRefused
from service.jobs.threads import run_in_thread
from service.jobs.webhooks.addresses import Reach

#: Names looked up at once; others wait.
AT_ONCE = 8
TIMEOUT_S = 5.0


class Resolver:
    """Asks the system for addresses; everything on the event loop."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._free = asyncio.Semaphore(AT_ONCE)
        self._looking: set[asyncio.Task[list[str]]] = set()

    async def resolve(self, host: str, port: int) -> list[str]:
        """The IP addresses of a host, of which each may be called; raises WebhookRefused."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                addresses = await self._look_up(host, port)
        except TimeoutError:
            raise WebhookRefused(f"{host} could not be looked up within {TIMEOUT_S:g} s: try again later") from None
        self._reach.check_addresses(host, addresses)
        return addresses

    async def _look_up(self, host: str, port: int) -> list[str]:
        await self._free.acquire()
        # Nothing stops the system's look-up: its place is free when it has ended, however long nobody waits for it.
        looking = asyncio.create_task(run_in_thread(lambda: _addresses(host, port), name="resolver"))
        self._looking.add(looking)
        looking.add_done_callback(self._looked_up)
        return await asyncio.shield(looking)

    def _looked_up(self, looking: asyncio.Task[list[str]]) -> None:
        self._looking.discard(looking)
        self._free.release()


def _addresses(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
