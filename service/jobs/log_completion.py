"""Completes the log of a job that was killed: a tensor may be in its checkpoint and not yet in the store."""

from __future__ import annotations

import logging

from service.engine.progress import TensorCompleted
from service.errors import ArrowQuantError
from service.jobs.database import Database
from service.jobs.folders import Folders
from service.jobs.journal import Journal
from service.jobs.live import LiveJob
from service.jobs.publisher import load_report
from service.jobs.store import Store
from service.storage.faults import storage_faults

logger = logging.getLogger(__name__)


async def complete_log(live: LiveJob, journal: Journal, database: Database, folders: Folders) -> None:
    """Tell all tensors of a job's report that were not told; never raises."""
    await journal.settled()
    job_id = live.job.id

    def untold(store: Store) -> list[TensorCompleted]:
        told = store.tensors_told(job_id)
        with storage_faults("reading the report"):
            outputs = load_report(folders.report(job_id)).outputs
        finished = (tensor.completed(output.name) for output in outputs for tensor in output.tensors)
        return [tensor for tensor in finished if (tensor.output, tensor.name) not in told]

    try:
        for tensor in await database.run(untold):
            live.happened(tensor)
    except ArrowQuantError as error:
        logger.warning("job %s: its log may lack tensors: %s", job_id, error.detail)
