"""One instance of each backend, shared by all jobs and calls."""

from __future__ import annotations

import threading

from service.engine.backends.base import Backend
from service.engine.backends.registry import backends, choose_backend


class BackendPool:
    """Makes backends when they are first asked for. Thread-safe."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._made: dict[str, Backend] = {}

    def get(self, id_: str = "auto") -> Backend:
        """The backend of this id; raises InvalidConfig when it cannot run here."""
        chosen = choose_backend(id_)
        with self._lock:
            if chosen not in self._made:
                self._made[chosen] = backends()[chosen](threads=self._threads)
            return self._made[chosen]
