"""One instance of each backend, shared by all jobs and calls; and how many jobs each device runs at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from service.engine.backends.base import CPU, Backend
from service.engine.backends.registry import backends, choose_backend
from service.errors import InvalidConfig


def lanes_of(cpu: int, others: Mapping[str, int]) -> dict[str, int]:
    """The lanes of every device that a backend computes on: of the CPU as said, of others as named or as they have.

    Raises InvalidConfig when others are named.
    """
    known = {backend.device: backend.lanes() for backend in backends().values() if backend.device != CPU}
    for device in others:
        if device not in known:
            raise InvalidConfig(_no_lanes(device, sorted(known)))
    return known | dict(others) | {CPU: cpu}


def _no_lanes(device: str, known: Sequence[str]) -> str:
    if device == CPU:
        return f"device_lanes cannot name {CPU!r}: set max_running_jobs instead"
    return f"device_lanes names {device!r}, on which no backend computes; there are {', '.join(known) or 'none'}"


class BackendPool:
    """Makes backends when they are first asked for. Thread-safe."""

    def __init__(self, threads: int, device_memory_bytes: int | None = None) -> None:
        """Of each device other than the CPU they may take `device_memory_bytes`; by default all that there are."""
        self._threads, self._device_memory_bytes = threads, device_memory_bytes or 0
        self._lock = threading.Lock()
        self._made: dict[str, Backend] = {}

    def get(self, id_: str = "auto") -> Backend:
        """The backend of this id; raises InvalidConfig when it cannot run here."""
        chosen = choose_backend(id_)
        with self._lock:
            if chosen not in self._made:
                self._made[chosen] = backends()[chosen](self._threads, self._device_memory_bytes)
            return self._made[chosen]

    def lanes_left(self, lanes: Mapping[str, int]) -> dict[str, int]:
        """Of these lanes, those of devices that have lost a part of what they were: a like part is left."""
        left: dict[str, int] = {}
        for backend in list(self._made.values()):
            if lost := len(backend.lost_devices()):
                parts = max(lost, type(backend).lanes())
                left[backend.device] = lanes[backend.device] * (parts - lost) // parts
        return left

    def lost_devices(self) -> dict[str, str]:
        """What the backends that were asked for have lost, each with the reason."""
        # Without the lock, which is held as long as a backend is made: the event loop asks.
        made = list(self._made.values())
        return {name: reason for backend in made for name, reason in backend.lost_devices().items()}
