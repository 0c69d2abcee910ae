"""Writes what happens to jobs to the store in batches, and shows it only once it is written.

So what a reader has seen survives a crash, and a burst of events costs few transactions.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from service.errors import ArrowQuantError
from service.jobs.events import Event
from service.jobs.job import Job
from service.jobs.standing import StandingTask

logger = logging.getLogger(__name__)

#: Written at once; readers get their turn after each batch.
BATCH = 256
#: Between attempts when the database cannot be written.
RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A new state of a job, an event, or both; `show` is called when they are stored."""

    job: Job | None
    event: Event | None
    show: Callable[[], None]


class Journal:
    """A queue of entries and the task that empties it; everything on the event loop."""

    def __init__(self, write: Callable[[Sequence[Job], Sequence[Event]], Awaitable[None]]) -> None:
        self._write = write
        self._entries: deque[Entry] = deque()
        # Those that are stored, and not yet shown.
        self._stored: deque[Entry] = deque()
        self._wake = asyncio.Event()
        self._is_refused = False
        self._task = StandingTask("the journal", self._run)

    @property
    def is_down(self) -> bool:
        """Whether a fault, its own or the database's, keeps it from storing anything now; it goes on by itself."""
        return self._is_refused or self._task.is_down

    def put(self, entry: Entry) -> None:
        """Add an entry behind all others; never waits."""
        self._entries.append(entry)
        self._wake.set()

    async def settled(self) -> None:
        """Wait until all that was put so far is stored and shown."""
        done = asyncio.Event()
        self.put(Entry(None, None, done.set))
        await done.wait()

    async def stop(self) -> None:
        """End the task; what is not written by now is lost."""
        await self._task.stop()

    async def _run(self) -> None:
        while True:
            # Without waiting: a fault may have left something.
            while self._entries or self._stored:
                await self._settle_batch()
                await asyncio.sleep(0)
            await self._wake.wait()
            self._wake.clear()

    async def _settle_batch(self) -> None:
        # A function of its own, so that no variable holds on to the last jobs.
        if not self._stored:
            batch = tuple(islice(self._entries, BATCH))
            await self._store(batch)
            # Only now: a fault leaves them to be stored again.
            for _ in batch:
                self._stored.append(self._entries.popleft())
        while self._stored:
            self._stored.popleft().show()

    async def _store(self, batch: Sequence[Entry]) -> None:
        jobs = [entry.job for entry in batch if entry.job is not None]
        events = [entry.event for entry in batch if entry.event is not None and entry.event.is_stored]
        while jobs or events:
            try:
                await self._write(jobs, events)
                self._is_refused = False
                break
            except ArrowQuantError as error:
                self._is_refused = True
                # The jobs run on; their states are written when the disk lets us.
                logger.error("the job database cannot be written, trying again: %s", error.detail)
                await asyncio.sleep(RETRY_S)
