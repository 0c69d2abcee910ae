"""A connection to the job database for the operator's commands, which may run beside a server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Self

from service.jobs.store import connect, database_faults


class SideConnection:
    """The database of one data folder. Thread-safe; every method may block.

    Raises StorageFailure when the database cannot be read or written.
    """

    def __init__(self, data_dir: Path) -> None:
        """Open the database, which is made when there is none."""
        self.data_dir = data_dir
        self._lock = threading.Lock()
        self._db = connect(data_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def _rows(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        with self._lock, database_faults():
            return self._db.execute(query, values).fetchall()
