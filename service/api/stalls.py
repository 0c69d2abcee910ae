"""How long the event loop was held up: by so much every other call was late."""

from __future__ import annotations

import asyncio

#: Between two looks at the clock; a stall is what a look comes late by.
INTERVAL_S = 0.02


class StallMonitor:
    """Measures the longest stall of the event loop it is started on."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

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
        self.longest_s = max(self.longest_s, asyncio.get_running_loop().time() - due)
        self.start()
