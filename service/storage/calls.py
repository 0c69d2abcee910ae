"""Calls to a store, several at a time, which whoever waits for them can walk away from."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

from service.errors import Cancelled, StoreUnavailable

T = TypeVar("T")
#: Between two looks at whether to go on waiting.
POLL_S = 0.1
#: A call gives up by itself in about twice its timeout; what takes longer hangs where nobody can tell it to end.
PATIENCE = 3


class Calls:
    """Threads that make calls. They hold up no exit: a call that hangs ends by its own timeout, with nobody waiting."""

    def __init__(self, threads: int, cancelled: Callable[[], bool], timeout_s: float, grace_s: float = 0.0) -> None:
        """At most so many calls are under way; `cancelled` is asked while they are.

        `timeout_s` is how long a store may fail to answer one call before the call gives up by itself;
        `grace_s` how long a call that has begun may go on after a cancel, to leave nothing half done.
        """
        self._threads = threads
        self._cancelled = cancelled
        self._patience_s = PATIENCE * timeout_s
        self._grace_s = grace_s
        self._waiting: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._started = 0
        self._left: list[Future[Any]] = []
        self._came_on = 0.0
        self._lock = threading.Lock()

    def run(self, call: Callable[[], T]) -> T:
        """Make one call; raises what it raises, or Cancelled."""
        return self.run_all([call])[0]

    def run_all(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Make these calls at once and wait for all; raises what the first raises that fails, or Cancelled.

        Also raises StoreUnavailable when none of them ends for too long.
        """
        futures: list[Future[T]] = [Future() for _ in calls]
        self._start(len(calls))
        for future, call in zip(futures, calls, strict=True):
            self._waiting.put((future, call))
        try:
            pending: set[Future[T]] = set(futures)
            heard = time.monotonic()
            while pending:
                done, pending = wait(pending, timeout=POLL_S, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if pending and self._cancelled():
                    wait(pending, self._grace_s)
                    raise Cancelled("the run was cancelled")
                heard = time.monotonic() if done else max(heard, self._came_on)
                if time.monotonic() - heard > self._patience_s:
                    raise StoreUnavailable("the store does not answer: try again when it is well")
            return [future.result() for future in futures]
        finally:
            # Those that no thread has begun never will be.
            self._left = [f for f in (*self._left, *futures) if not f.cancel() and not f.done()]

    def come_on(self) -> None:
        """Said by a call that takes long, and is not given up for that."""
        self._came_on = time.monotonic()

    def settled(self) -> bool:
        """Wait until the calls that were walked away from have ended; False when one does not in its time."""
        return not wait(self._left, self._patience_s).not_done

    def close(self) -> None:
        """Let the threads end when they have made the calls they are making."""
        for _ in range(self._started):
            self._waiting.put(None)

    def _start(self, wanted: int) -> None:
        with self._lock:
            while self._started < min(wanted, self._threads):
                self._started += 1
                threading.Thread(target=_work, args=(self._waiting,), name="store-call", daemon=True).start()


def _work(waiting: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (item := waiting.get()) is not None:
        future, call = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            future.set_exception(error)
        del item, future, call
