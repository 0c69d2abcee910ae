"""Looks host names up off the event loop, and lets none through that leads where webhooks may not go.

A name server may take as long as it likes, and it is the tenant's: so each tenant has few look-ups at once.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from ipaddress import ip_address
from weakref import WeakValueDictionary

from service.errors import LookupsBusy, WebhookRefused
from service.jobs.threads import run_in_thread
from service.jobs.webhooks.addresses import Reach

#: Names looked up at once; others wait.
AT_ONCE = 64
AT_ONCE_OF_TENANT = 8
#: How long they wait at most, and how long a look-up may take.
WAIT_S = 5.0
TIMEOUT_S = 5.0


class Resolver:
    """Asks the system for addresses; everything on the event loop."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._free = asyncio.Semaphore(AT_ONCE)
        # Kept by those who hold or await them.
        self._free_of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._looking: set[asyncio.Task[list[str]]] = set()

    async def resolve(self, host: str, port: int, tenant: str) -> list[str]:
        """The IP addresses of a tenant's host, of which each may be called; raises WebhookRefused or LookupsBusy."""
        addresses = [host] if _is_address(host) else await self._look_up(host, port, tenant)
        self._reach.check_addresses(host, addresses)
        return addresses

    async def _look_up(self, host: str, port: int, tenant: str) -> list[str]:
        has_begun = asyncio.Event()
        # Nothing stops the system's look-up: its place is free when it has ended, however long nobody waits for it.
        looking = asyncio.create_task(self._ask(host, port, tenant, has_begun))
        self._looking.add(looking)
        looking.add_done_callback(self._looking.discard)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    await has_begun.wait()
        finally:
            if not has_begun.is_set():
                looking.cancel()
        if not has_begun.is_set():
            raise LookupsBusy(f"{host} was not looked up: other names are, and take long; try again in a moment")
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await asyncio.shield(looking)
        except TimeoutError:
            raise WebhookRefused(f"{host} could not be looked up within {TIMEOUT_S:g} s: try again later") from None

    async def _ask(self, host: str, port: int, tenant: str, has_begun: asyncio.Event) -> list[str]:
        async with self._free_of.setdefault(tenant, asyncio.Semaphore(AT_ONCE_OF_TENANT)), self._free:
            has_begun.set()
            return await run_in_thread(lambda: _addresses(host, port), name="resolver")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _addresses(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
