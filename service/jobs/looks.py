"""Looks at addresses, each made once for all who ask."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from copy import copy


class Looks:
    """What was found of the addresses of one submission; several threads may ask at once."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Future[None]] = {}
        self._lock = threading.Lock()

    def once(self, key: Hashable, look: Callable[[], None]) -> None:
        """Look, or wait for who looks already; raises what that has raised, each time an error of its own."""
        with self._lock:
            is_first = key not in self._made
            made = self._made.setdefault(key, Future())
        if is_first:
            try:
                look()
            except BaseException as error:  # noqa: BLE001 - whoever asks gets it
                made.set_exception(error)
            else:
                made.set_result(None)
        if (raised := made.exception()) is not None:
            raise copy(raised) from raised  # a pointer into the request is put before it
