"""Why a running job is to stop: asked from its worker thread between row blocks."""

from __future__ import annotations

import time
from enum import Enum


class Reason(Enum):
    """What made a job stop."""

    CANCEL = "cancel"
    DRAIN = "drain"
    TIMEOUT = "timeout"


class StopSignal:
    """Set on the event loop, read in a worker thread: plain attributes, each written in one step."""

    def __init__(self) -> None:
        self._asked: Reason | None = None
        self._deadline: float | None = None

    def ask(self, reason: Reason) -> None:
        """Ask the job to stop. A cancel outweighs a drain: its files are not kept."""
        if self._asked is not Reason.CANCEL:
            self._asked = reason

    def set_deadline(self, seconds: float) -> None:
        """Stop the job after so many seconds from now."""
        self._deadline = time.monotonic() + seconds

    @property
    def reason(self) -> Reason | None:
        """Why to stop, or None."""
        if self._asked is not None:
            return self._asked
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return Reason.TIMEOUT if late else None

    def is_set(self) -> bool:
        """Whether to stop: the engine's `cancelled`."""
        return self.reason is not None
