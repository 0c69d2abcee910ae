"""Watches how long the event loop is held up: it never should be."""

from __future__ import annotations

import asyncio

#: Between two looks at the clock; a stall is what a look comes late by.
INTERVAL_S = 0.05


class LoopWatch:
    """Measures the longest stall of the event loop it is started on."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin; called on the loop."""
        self._look_again()

    def stop(self) -> None:
        """End."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def reset(self) -> None:
        """Measure anew from here."""
        self.longest_s = 0.0

    def _look_again(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(loop.time() + INTERVAL_S, self._look, loop.time() + INTERVAL_S)

    def _look(self, due: float) -> None:
        self.longest_s = max(self.longest_s, asyncio.get_running_loop().time() - due)
        self._look_again()
