"""Removes the files of jobs that no longer list them, as soon as nobody reads them any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

from service.errors import ArrowQuantError
from service.jobs import retention_table
from service.jobs.database import Database
from service.jobs.folders import Folders
from service.jobs.leases import Leases
from service.storage.faults import storage_faults

logger = logging.getLogger(__name__)

#: Removed between two notes in the database.
PAGE = 100


class Removals:
    """Empties the table of removals; on the event loop."""

    def __init__(
        self,
        database: Database,
        folders: Folders,
        leases: Leases,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """`spawn` has a coroutine run that nobody waits for."""
        self._database = database
        self._folders = folders
        self._leases = leases
        self._spawn = spawn

    async def clear(self, job_ids: Iterable[str]) -> None:
        """Remove the files of these jobs that are to go: now, or when the last one who holds them lets go."""
        taken = self._leases.taken()
        free = []
        for job_id in job_ids:
            if job_id in taken:
                self._leases.when_free(job_id, partial(self._clear_soon, job_id))
            else:
                free.append(job_id)
        await self._clear(free)

    async def clear_all(self) -> None:
        """Remove all files that are to go and that nobody holds, such as those an earlier server left."""
        last = ""
        while found := await self._database.read(partial(retention_table.all_removals, after=last, limit=PAGE)):
            await self.clear(found)
            last = max(found)

    async def _clear(self, job_ids: Sequence[str]) -> None:
        if not job_ids:
            return
        to_go = await self._database.read(lambda db: retention_table.removals(db, job_ids))
        gone = await asyncio.to_thread(self._remove, to_go)
        await self._database.change(lambda db: retention_table.forget_removals(db, gone))

    def _remove(self, to_go: dict[str, bool]) -> dict[str, bool]:
        """Those whose files are gone; what resists is tried again later."""
        with storage_faults("removing files that are kept no longer"):
            return {job_id: keeps for job_id, keeps in to_go.items() if _remove_files(self._folders, job_id, keeps)}

    def _clear_soon(self, job_id: str) -> None:
        self._spawn(self._clear_later(job_id))

    async def _clear_later(self, job_id: str) -> None:
        try:
            await self._clear([job_id])
        except ArrowQuantError as error:
            logger.warning("job %s: its files go at the next sweep or start: %s", job_id, error.detail)


def _remove_files(folders: Folders, job_id: str, keeps_report: bool) -> bool:
    """Remove a job's files, with its report or without; whether they are gone. Blocks."""
    if keeps_report:
        return folders.remove_outputs(job_id)
    folders.remove(job_id)
    return folders.are_gone(job_id)
