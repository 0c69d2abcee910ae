"""Carries what a worker thread reports to the event loop, in as few hops as the loop can take."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from service.engine.progress import Happening, Progress
from service.jobs.threads import call_on_loop

#: Handed over at once; the loop serves others in between.
BATCH = 256
#: Between two hand-overs of one job.
INTERVAL_S = 0.01


class Mailbox:
    """One way, from a worker thread to the loop. Of progress only the newest is kept."""

    def __init__(self, deliver: Callable[[Happening], None]) -> None:
        """Made on the loop, which `deliver` is called on."""
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._lock = threading.Lock()
        self._items: deque[Happening] = deque()
        self._progress: Progress | None = None
        self._awake = False
        self._next_at = 0.0

    def put(self, happening: Happening) -> None:
        """Report from the worker thread; never waits for the loop."""
        with self._lock:
            if isinstance(happening, Progress):
                self._progress = happening
            else:
                self._items.append(happening)
            wake, self._awake = not self._awake, True
        if wake:
            call_on_loop(self._loop, self._wake)

    async def flush(self) -> None:
        """Deliver all that is left; the worker has ended."""
        more = True
        while more:
            more = self._deliver_batch()
            await asyncio.sleep(0)

    def _wake(self) -> None:
        self._loop.call_at(max(self._next_at, self._loop.time()), self._drain)

    def _drain(self) -> None:
        self._next_at = self._loop.time() + INTERVAL_S
        if self._deliver_batch():
            self._loop.call_soon(self._drain)

    def _deliver_batch(self) -> bool:
        """Deliver some; whether there is more."""
        with self._lock:
            batch = [self._items.popleft() for _ in range(min(BATCH, len(self._items)))]
            more = bool(self._items)
            if not more:
                progress, self._progress = self._progress, None
                batch += [progress] if progress is not None else []
            self._awake = more
        for happening in batch:
            self._deliver(happening)
        return more
