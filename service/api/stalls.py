"""How long the event loop was held up: by so much every other call was late."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

#: Between two looks at the clock; a stall is what a look comes late by.
INTERVAL_S = 0.02
#: What lies further back is forgotten.
WINDOW_S = 60.0


class StallMonitor:
    """Measures how late the event loop is on which it is started."""

    def __init__(self) -> None:
        #: Called with each look's delay in seconds.
        self.observe: Callable[[float], object] = lambda _: None
        self._timer: asyncio.TimerHandle | None = None
        # When and how long; each longer than all that came after it, so the first is the longest.
        self._stalls: deque[tuple[float, float]] = deque()

    @property
    def longest_s(self) -> float:
        """The longest of the last minute."""
        while self._stalls and self._stalls[0][0] < time.monotonic() - WINDOW_S:
            self._stalls.popleft()
        return self._stalls[0][1] if self._stalls else 0.0

    def start(self) -> None:
        """Begin; called on the loop."""
        loop = asyncio.get_running_loop()
        due = loop.time() + INTERVAL_S
        self._timer = loop.call_at(due, self._look, due)

    def stop(self) -> None:
        """End."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, due: float) -> None:
        stall = asyncio.get_running_loop().time() - due
        while self._stalls and self._stalls[-1][1] <= stall:
            self._stalls.pop()
        self._stalls.append((time.monotonic(), stall))
        self.observe(stall)
        self.start()
