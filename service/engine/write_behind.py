"""Writes what is finished in a thread of its own, while the next piece is worked on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from service.engine.clock import Clock

#: Less than this waits for more: another thread is not told of every small tensor.
WORTHWHILE_BYTES = 256 << 10
#: But no longer than this.
INTERVAL_S = 0.01
#: What calls may hold while they wait; a single one may hold more.
WAITING_BYTES = 4 << 20

Call = Callable[[], None]


class WriteBehind:
    """Calls in order, one at a time, in another thread; one thread may ask for them.

    When a call has raised, none of those behind it is made, and the error is raised where the next is asked for.
    """

    def __init__(self, clock: Clock) -> None:
        """The clock is told of time spent waiting."""
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._gathered: list[Call] = []
        self._gathered_bytes = 0
        self._gathered_at = 0.0
        self._begun: deque[tuple[Future[None], int]] = deque()
        self._is_broken = False

    def put(self, call: Call, nbytes: int = 0) -> None:
        """Have a call made soon that holds so many bytes; waits while those before it hold too many."""
        if not self._gathered:
            self._gathered_at = time.monotonic()
        self._gathered.append(call)
        self._gathered_bytes += nbytes
        if self._gathered_bytes >= WORTHWHILE_BYTES or time.monotonic() - self._gathered_at > INTERVAL_S:
            self.go()

    def go(self) -> None:
        """Have all calls made now; what comes next may take long."""
        if self._gathered:
            calls, nbytes = self._gathered, self._gathered_bytes
            self._gathered, self._gathered_bytes = [], 0
            self._make_room(nbytes)
            self._begun.append((self._thread.submit(self._make, calls), nbytes))

    def settle(self) -> None:
        """Wait until all calls are made; raises what one of them raised."""
        self.go()
        while self._begun:
            self._wait_for_first()

    def close(self, last: Call) -> None:
        """Make the calls that wait and a last one, unless one has raised, and end the thread; raises nothing."""
        calls, self._gathered = [*self._gathered, last], []
        self._thread.submit(self._make, calls)
        self._thread.shutdown()

    def _make(self, calls: list[Call]) -> None:
        if self._is_broken:
            return
        self._is_broken = True  # unless we come to the end
        calls.reverse()
        while calls:
            calls.pop()()  # lets go of what it held
        self._is_broken = False

    def _make_room(self, nbytes: int) -> None:
        while self._begun and (self._begun[0][0].done() or self._held + nbytes > WAITING_BYTES):
            self._wait_for_first()

    @property
    def _held(self) -> int:
        return sum(nbytes for _, nbytes in self._begun)

    def _wait_for_first(self) -> None:
        future, _ = self._begun.popleft()
        if not future.done():
            with self._clock.during("write"):
                future.result()
        future.result()
