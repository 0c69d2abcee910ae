"""Looking names up: what is slow for one tenant is not for another."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from service.errors import LookupsBusy, WebhookRefused
from service.jobs.webhooks import resolver as module
from service.jobs.webhooks.addresses import Reach
from service.jobs.webhooks.resolver import AT_ONCE, AT_ONCE_OF_TENANT, Resolver

PUBLIC = "93.184.215.14"
Occupied = Callable[..., AbstractAsyncContextManager[None]]


@pytest.fixture
def occupied(monkeypatch: pytest.MonkeyPatch) -> Occupied:
    """For `async with`: name servers that do not answer so many look-ups of a tenant."""
    answer, real = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: Any, **options: Any) -> Any:
        if host.endswith(".slow.test"):
            answer.wait()
        return real(PUBLIC, *arguments, **options)

    @asynccontextmanager
    async def occupy(resolver: Resolver, tenant: str, count: int) -> AsyncIterator[None]:
        looking = [asyncio.create_task(resolver.resolve(f"{i}.slow.test", 443, tenant)) for i in range(count)]
        # A turn of the loop for each to ask, and one to be given its place.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        try:
            yield
        finally:
            answer.set()
            assert await asyncio.gather(*looking) == [[PUBLIC]] * count

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    # Of those that wait no one is given up while the test goes on.
    monkeypatch.setattr(module, "TIMEOUT_S", 60.0)
    return occupy


async def test_slow_names_of_a_tenant_hold_up_no_other_tenant(occupied: Occupied) -> None:
    resolver = Resolver(Reach())
    async with occupied(resolver, "slow", AT_ONCE):
        assert await resolver.resolve("quick.test", 443, "quick") == [PUBLIC]


async def test_who_has_enough_names_looked_up_waits_and_is_told_so(
    occupied: Occupied, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = Resolver(Reach())
    async with occupied(resolver, "slow", AT_ONCE_OF_TENANT):
        with monkeypatch.context() as patch:
            patch.setattr(module, "WAIT_S", 0.05)
            with pytest.raises(LookupsBusy, match=r"quick\.test was not looked up"):
                await resolver.resolve("quick.test", 443, "slow")
        waiting = asyncio.create_task(resolver.resolve("quick.test", 443, "slow"))
        await asyncio.sleep(0)
    assert await waiting == [PUBLIC]


async def test_an_ip_address_is_not_looked_up(occupied: Occupied) -> None:
    resolver = Resolver(Reach())
    async with occupied(resolver, "slow", AT_ONCE_OF_TENANT):
        for address in ("8.8.8.8", "2606:4700::1111"):
            assert await resolver.resolve(address, 443, "slow") == [address]
        for address in ("10.0.0.1", "::ffff:8.8.8.8"):
            with pytest.raises(WebhookRefused):
                await resolver.resolve(address, 443, "slow")
