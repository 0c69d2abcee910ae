"""Threads for calls that may take long, so many at once: they hold up none that are not of their kind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from service.errors import ArrowQuantError
from service.jobs.threads import run_in_thread

T = TypeVar("T")
#: How long a call waits for a place.
PLACE_WAIT_S = 2.0


class LimitedThreads:
    """So many calls at once; on one event loop."""

    def __init__(self, places: int, name: str, full: Callable[[], ArrowQuantError]) -> None:
        """`full` makes what is raised where no place is free soon."""
        self._places = asyncio.Semaphore(places)
        self._name, self._full = name, full

    async def run(self, work: Callable[[], T]) -> T:
        """Run a function in a thread; raises what it raises, and what `full` makes when no place is free soon.

        Whoever stops waiting leaves the thread behind, and its place is taken until that ends.
        """
        try:
            async with asyncio.timeout(PLACE_WAIT_S):
                await self._places.acquire()
        except TimeoutError:
            raise self._full() from None
        running = asyncio.ensure_future(run_in_thread(partial(copy_context().run, work), self._name))
        running.add_done_callback(self._leave)
        return await asyncio.shield(running)

    def _leave(self, running: asyncio.Future[T]) -> None:
        self._places.release()
        if not running.cancelled():
            running.exception()  # taken up here: whoever asked may have gone
