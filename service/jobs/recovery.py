"""What a server finds when it starts: the jobs that an earlier one left, and work folders that belong to none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from service.engine.checkpoint import seconds_run
from service.jobs import batch_table
from service.jobs.folders import Folders
from service.jobs.job import Job
from service.jobs.publisher import Publisher
from service.jobs.store import Store
from service.storage.durable import remove
from service.storage.faults import storage_faults


@dataclass(frozen=True, slots=True)
class Leftover:
    """A job that has not ended, and where it stood. `seconds_run` are those of its turns, up to its checkpoint."""

    job: Job
    last_event_id: int
    seconds_run: float
    targets: tuple[PurePath, ...]


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """A batch of which so many jobs have not ended, and the largest id in its stream."""

    id: str
    jobs: int
    last_event_id: int


def open_batches(store: Store, leftovers: Sequence[Leftover]) -> list[OpenBatch]:
    """The batches that the jobs to go on with belong to. Blocks."""
    counts = Counter(leftover.job.batch_id for leftover in leftovers if leftover.job.batch_id is not None)
    with store.reading() as db:
        return [OpenBatch(id_, jobs, batch_table.last_event_id(db, id_)) for id_, jobs in counts.items()]


def recover(store: Store, folders: Folders, publisher: Publisher) -> list[Leftover]:
    """The jobs to go on with, oldest first, those among them that were being cancelled. Blocks.

    The work folders of others are cleared away. Artifacts and blobs that belong to nobody are many to look for: see
    `orphans`.
    """
    with storage_faults("opening the data folder"):
        folders.create()
        jobs = store.active()
        active = {job.id for job in jobs}
        for job_id in folders.in_work():
            if job_id not in active:
                remove(folders.work(job_id))
    return [
        Leftover(
            job, store.last_event_id(job.id), seconds_run(folders.checkpoint(job.id)), publisher.targets_elsewhere(job)
        )
        for job in jobs
    ]
