"""Why a running job is to stop: asked from its worker thread between row blocks."""

from __future__ import annotations

import time
from enum import Enum

from service.engine.progress import Happening, Progress, Report


class Reason(Enum):
    """What made a job stop."""

    CANCEL = "cancel"
    DRAIN = "drain"
    TIMEOUT = "timeout"
    PARK = "park"


class StopSignal:
    """Set on the event loop, read in a worker thread: plain attributes, each written in one step.

    A job is parked between two tensors only, when all that it has done is in its checkpoint: the worker thread tells
    by `watching` what it reports, and takes the wish up when it next asks whether to stop.
    """

    def __init__(self) -> None:
        self._asked: Reason | None = None
        self._deadline: float | None = None
        self._is_to_park = False
        self._is_between = False
        self._is_parking = False

    def ask(self, reason: Reason) -> None:
        """Ask the job to stop. A cancel outweighs a drain: its files are not kept."""
        if self._asked is not Reason.CANCEL:
            self._asked = reason

    def ask_to_park(self) -> None:
        """Ask the job to stop when its tensor is finished, to go on later."""
        self._is_to_park = True

    def set_deadline(self, seconds: float) -> None:
        """Stop the job after so many seconds from now."""
        self._deadline = time.monotonic() + seconds

    @property
    def reason(self) -> Reason | None:
        """Why to stop, or None."""
        if self._asked is not None:
            return self._asked
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return Reason.TIMEOUT
        return Reason.PARK if self._is_parking else None

    def is_set(self) -> bool:
        """Whether to stop: the engine's `cancelled`."""
        is_between, self._is_between = self._is_between, False
        self._is_parking = self._is_parking or (is_between and self._is_to_park)
        return self.reason is not None

    def watching(self, report: Report) -> Report:
        """`report`, and a look at when a tensor is finished that is not the last: the engine asks then at once."""
        done: int | None = None

        def watched(happening: Happening) -> None:
            nonlocal done
            if isinstance(happening, Progress):
                is_further = done is not None and happening.tensors_done > done
                done = happening.tensors_done
                self._is_between = is_further and done < happening.tensors_total
            report(happening)

        return watched
