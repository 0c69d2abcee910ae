"""What a device of the `cuda` backend is, and what becomes of work when it has too little memory or fails."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from service.engine.backends.work import Work

#: A device that has not served anybody for so long is waited for; all are held by calls that end.
_WAIT_S = 0.1


class DeviceFailed(Exception):
    """A device can no longer be used; the message says why."""


class Device(ABC):
    """Runs work, several pieces at a time. One thread may use it; `DevicePool` sees to that."""

    #: How a user calls it.
    name: str
    #: Pieces that may be under way.
    slots: int = 1

    @abstractmethod
    def submit(self, work: Work) -> Any:
        """Begin a piece and give what `collect` wants; raises MemoryError or DeviceFailed."""

    @abstractmethod
    def collect(self, ticket: Any) -> None:
        """Wait for the oldest piece under way and fill its outputs; raises DeviceFailed."""

    @abstractmethod
    def release(self) -> None:
        """Let go of all memory, and forget what is under way; raises DeviceFailed."""


class Pieces(Protocol):
    """Work on `total` items, which may be cut anywhere; a piece may be done again after a failure."""

    total: int
    #: What a user calls them.
    unit: str

    def work(self, first: int, last: int) -> Work:
        """What a device does for items [first, last)."""

    def done(self, first: int, last: int, work: Work) -> None:
        """The outputs of a piece are filled."""

    def on_host(self, first: int, last: int) -> None:
        """Do items [first, last) without a device."""


class DevicePool:
    """Lends devices to calls, one to each, and brings every call to its end. Thread-safe."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._free: queue.LifoQueue[Device] = queue.LifoQueue()
        self._serving = {device.name for device in devices}
        self._lost: dict[str, str] = {}
        self._told = threading.local()
        for device in devices:
            self._free.put(device)

    @property
    def lost(self) -> dict[str, str]:
        """The devices that are out of service, each with the reason."""
        return dict(self._lost)

    def take_notices(self) -> list[str]:
        """What went otherwise than planned in calls of this thread, since it was last asked."""
        told, self._told.notices = getattr(self._told, "notices", []), []
        return told

    def run(self, pieces: Pieces, step: int) -> None:
        """Do all of it, at most `step` items at a time.

        A device that lacks memory gets half as many at a time, and if that was one, the host does the rest. A
        device that fails is out of service; another one goes on, or the host.
        """
        course = _Course(pieces, max(1, step))
        while not course.is_over:
            device = self._take()
            if device is None:
                course.on_host()
                return
            if not self._serve(course, device):
                continue
            lacking = f"{device.name} has not enough memory"
            if not course.step:
                self._tell(f"{lacking}: the rest is computed on the CPU")
                course.on_host()
            elif course.is_over and course.step < step:
                self._tell(f"{lacking} for {step} {pieces.unit} at once: {course.step} were taken")

    def _serve(self, course: _Course, device: Device) -> bool:
        """Go on with a device, and put it back; or False, when it has failed."""
        try:
            course.go_on_or_shorten(device)
        except DeviceFailed as error:
            self._retire(device, str(error))
            return False
        except BaseException:
            self._free.put(device)
            raise
        self._free.put(device)
        return True

    def _take(self) -> Device | None:
        while self._serving:
            try:
                return self._free.get(timeout=_WAIT_S)
            except queue.Empty:
                continue
        return None

    def _retire(self, device: Device, reason: str) -> None:
        self._serving.discard(device.name)
        self._lost[device.name] = reason
        others = "another device goes on" if self._serving else "the CPU goes on"
        self._tell(f"{device.name} failed and is out of service, {others}: {reason}")

    def _tell(self, notice: str) -> None:
        self._told.notices = [*getattr(self._told, "notices", []), notice]


class _Course:
    """How far a call has come; `step` is 0 when a device has not enough memory for a single item."""

    def __init__(self, pieces: Pieces, step: int) -> None:
        self.pieces, self.step = pieces, step
        self._next = 0  # behind the last piece that is done

    @property
    def is_over(self) -> bool:
        return self._next >= self.pieces.total

    def on_host(self) -> None:
        """Do what is left without a device."""
        first, self._next = self._next, self.pieces.total
        self.pieces.on_host(first, self.pieces.total)

    def go_on_or_shorten(self, device: Device) -> None:
        """Do what is left, or as much of it as the device has memory for, and have shorter pieces from then on."""
        try:
            self._go_on(device)
        except MemoryError:
            device.release()
            self.step = (self.step + 1) // 2 if self.step > 1 else 0
        except DeviceFailed:
            raise
        except BaseException:
            with suppress(DeviceFailed):
                device.release()  # what is under way must not meet what comes next
            raise

    def _go_on(self, device: Device) -> None:
        """As many pieces at a time as the device takes."""
        under_way: deque[tuple[int, int, Work, Any]] = deque()
        first = self._next
        while not self.is_over:
            if first < self.pieces.total and len(under_way) < device.slots:
                last = min(first + self.step, self.pieces.total)
                work = self.pieces.work(first, last)
                try:
                    under_way.append((first, last, work, device.submit(work)))
                except MemoryError:
                    while under_way:
                        self._collect(device, *under_way.popleft())
                    raise
                first = last
            else:
                self._collect(device, *under_way.popleft())

    def _collect(self, device: Device, first: int, last: int, work: Work, ticket: Any) -> None:
        device.collect(ticket)
        self.pieces.done(first, last, work)
        self._next = last
