"""Who runs next: a fixed number of lanes, the highest priority first, then who came first."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Scheduler:
    """Hands waiting jobs to free lanes; everything on the event loop."""

    def __init__(self, lanes: int, start: Callable[[str], None]) -> None:
        """`start` is called with a job's id when a lane is free for it, and must not wait."""
        self._free = lanes
        self._start = start
        self._arrivals = 0
        self._waiting: dict[str, tuple[int, int, int]] = {}
        self._stopped = False
        self.running = 0

    @property
    def depth(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    def ahead_of(self, priority: int) -> int:
        """How many of the waiting would run before a job that came now."""
        return sum(key < (1, -priority, self._arrivals + 1) for key in self._waiting.values())

    def put(self, job_id: str, priority: int, *, resumed: bool = False) -> None:
        """Queue a job; one that ran before a restart goes first."""
        self._arrivals += 1
        self._waiting[job_id] = (0 if resumed else 1, -priority, self._arrivals)
        self._dispatch()

    def remove(self, job_id: str) -> bool:
        """Take a waiting job out; False when it does not wait."""
        return self._waiting.pop(job_id, None) is not None

    def lane_freed(self) -> None:
        """A job that was started has left its lane."""
        self._free += 1
        self.running -= 1
        self._dispatch()

    def stop(self) -> None:
        """Start nothing more."""
        self._stopped = True

    def _dispatch(self) -> None:
        while self._free and self._waiting and not self._stopped:
            job_id = min(self._waiting, key=self._waiting.__getitem__)
            del self._waiting[job_id]
            self._free -= 1
            self.running += 1
            self._start(job_id)


async def run_in_thread(work: Callable[[], T], name: str) -> T:
    """Run a function, which must not raise, in a thread of its own: it holds up no exit and leaves nothing behind."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    threading.Thread(target=lambda: call_on_loop(loop, _settle, done, work()), name=name, daemon=True).start()
    return await done


def _settle(done: asyncio.Future[T], result: T) -> None:
    if not done.done():
        done.set_result(result)


def call_on_loop(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    """As `call_soon_threadsafe`, but says nothing to a loop that is gone: a drain that took too long has ended it."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise
