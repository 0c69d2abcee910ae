"""Who uses what now: whatever is held is neither expired nor removed from the disk."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Leases:
    """Counts the users of jobs and batches, by id. Thread-safe; an id need not exist.

    Whoever takes a lease first and looks at the record then is safe: what it finds stays until the lease is given back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._then: dict[str, Callable[[], None]] = {}

    @contextmanager
    def held(self, *ids: str) -> Iterator[None]:
        """Hold these as long as the context is open."""
        self.take(*ids)
        try:
            yield
        finally:
            self.give_back(*ids)

    def take(self, *ids: str) -> None:
        """Hold these once more."""
        with self._lock:
            self._counts.update(ids)

    def give_back(self, *ids: str) -> None:
        """Hold these once less, and have done what waited for it."""
        with self._lock:
            self._counts.subtract(ids)
            free = {id_ for id_ in ids if self._counts[id_] <= 0}
            for id_ in free:
                del self._counts[id_]
            waiting = [call for call in (self._then.pop(id_, None) for id_ in free) if call is not None]
        for call in waiting:
            call()

    def taken(self) -> frozenset[str]:
        """All that somebody holds."""
        with self._lock:
            return frozenset(self._counts)

    def when_free(self, id_: str, call: Callable[[], None]) -> None:
        """Have something done when nobody holds this any more: now, or by whoever gives it back last."""
        with self._lock:
            if self._counts.get(id_):
                self._then[id_] = call
                return
        call()
