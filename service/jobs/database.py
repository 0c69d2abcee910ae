"""The thread of the store."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from service.jobs.store import Store

T = TypeVar("T")


class Database:
    """Has work done in the one thread that the store is used from; awaited on the event loop.

    `read` and `change` are for the tables that have modules of their own.
    """

    def __init__(self, store: Callable[[], Store], thread: Executor) -> None:
        """`store` gives the open store, or raises."""
        self._store = store
        self._thread = thread

    async def run(self, work: Callable[[Store], T]) -> T:
        """What something gives that is done with the store."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(self._store()))

    async def read(self, look: Callable[[sqlite3.Connection], T]) -> T:
        """What queries give."""

        def work(store: Store) -> T:
            with store.reading() as db:
                return look(db)

        return await self.run(work)

    async def change(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What statements give that hold together: all of them or none."""

        def change(store: Store) -> T:
            with store.transaction() as db:
                return work(db)

        return await self.run(change)
