"""What running jobs may take of memory together, and what each was given of it."""

from __future__ import annotations

import threading


class MemoryLedger:
    """Bytes that were given to jobs, by their predictions. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._given: dict[str, int] = {}
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Given to all jobs together."""
        return self._used

    def fits(self, nbytes: int) -> bool:
        """Whether there is room for so much more."""
        return self._used + nbytes <= self.limit_bytes

    def give(self, job_id: str, nbytes: int) -> bool:
        """Give a job so much, in place of what it had; False, and nothing is changed, when there is no room."""
        with self._lock:
            others = self._used - self._given.get(job_id, 0)
            if others + nbytes > self.limit_bytes:
                return False
            self._given[job_id] = nbytes
            self._used = others + nbytes
            return True

    def given(self, job_id: str) -> int:
        """What a job has."""
        return self._given.get(job_id, 0)

    def take_back(self, job_id: str) -> int:
        """A job needs nothing more; what it had."""
        with self._lock:
            given = self._given.pop(job_id, 0)
            self._used -= given
            return given
