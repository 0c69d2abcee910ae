"""Threads for calls that may wait for a store, apart from all others: one that hangs holds up none that needs none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from service.errors import StoreUnavailable
from service.jobs.threads import run_in_thread

T = TypeVar("T")
#: How long a call waits for a place.
PLACE_WAIT_S = 2.0


class StoreThreads:
    """So many calls at once; on one event loop."""

    def __init__(self, places: int) -> None:
        self._places = asyncio.Semaphore(places)

    async def run(self, work: Callable[[], T]) -> T:
        """Run a function in a thread; raises what it raises, and StoreUnavailable when no place is free soon.

        Whoever stops waiting leaves the thread behind, and its place is taken until that ends.
        """
        try:
            async with asyncio.timeout(PLACE_WAIT_S):
                await self._places.acquire()
        except TimeoutError:
            raise StoreUnavailable(
                "as many calls as this server makes at once wait for a store already: try again when it is well"
            ) from None
        running = asyncio.ensure_future(run_in_thread(partial(copy_context().run, work), "store-wait"))
        running.add_done_callback(self._leave)
        return await asyncio.shield(running)

    def _leave(self, running: asyncio.Future[T]) -> None:
        self._places.release()
        if not running.cancelled():
            running.exception()  # taken up here: whoever asked may have gone
