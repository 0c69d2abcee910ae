"""Removes files that belong to nobody, which a crash may leave: a little at a time, beside all other work.

Nothing uses them meanwhile: files are found by the record of their job or by who has the blob, and these have none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from itertools import islice

from service.errors import ArrowQuantError
from service.jobs import retention_table
from service.jobs.blobs import Blobs
from service.jobs.database import Database
from service.jobs.folders import Folders
from service.jobs.job import Status
from service.jobs.leases import Leases
from service.storage.durable import remove
from service.storage.faults import storage_faults

logger = logging.getLogger(__name__)

#: Folders looked up between two turns of others.
CHUNK = 200


async def tidy(database: Database, folders: Folders, leases: Leases, blobs: Blobs) -> None:
    """As `remove_orphans`; what cannot be done now is left to the next start, and the log says so."""
    try:
        await remove_orphans(database, folders, leases, blobs)
    except ArrowQuantError as error:
        logger.warning("files that belong to nobody could not all be removed: %s", error.detail)


async def remove_orphans(database: Database, folders: Folders, leases: Leases, blobs: Blobs) -> None:
    """Remove artifacts of jobs that are unknown or have ended without success, and blobs that no tenant has.

    Raises StorageFailure, DiskFull or NotReady.
    """
    found = folders.with_artifacts()
    while job_ids := await asyncio.to_thread(_next_of, found):
        statuses = await database.run(lambda store, ids=job_ids: store.statuses(ids))  # type: ignore[misc]
        to_go = [job_id for job_id in job_ids if _is_over(statuses.get(job_id))]
        # Of a job that was purged a moment ago files may still be read: they go with the last reader.
        purged = await database.read(lambda db, ids=to_go: retention_table.removals(db, ids))  # type: ignore[misc]
        taken = leases.taken()
        await asyncio.to_thread(_remove, folders, [id_ for id_ in to_go if id_ not in purged and id_ not in taken])
    steps = blobs.recover()
    while await asyncio.to_thread(next, steps, False):
        pass


def _next_of(found: Iterator[str]) -> list[str]:
    with storage_faults("looking for files that belong to nobody"):
        return list(islice(found, CHUNK))


def _is_over(status: Status | None) -> bool:
    """Whether a job that is in this state, or unknown, has no artifacts."""
    return status is None or (status.is_terminal and status is not Status.SUCCEEDED)


def _remove(folders: Folders, job_ids: Sequence[str]) -> None:
    with storage_faults("removing files that belong to nobody"):
        for job_id in job_ids:
            remove(folders.artifacts(job_id))
