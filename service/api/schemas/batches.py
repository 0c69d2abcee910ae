"""A batch as the API shows it."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from service.api.schemas.common import Wire
from service.jobs.batch import BatchStatus


class BatchCounts(Wire):
    """How many of a batch's jobs are in each state; one that was purged or has expired is in none but `total`."""

    total: int = Field(description="As many as there were items.")
    queued: int = 0
    running: int = 0
    cancelling: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0


class BatchLinks(Wire):
    """Where to go from a batch."""

    self: str
    events: str
    jobs: str


class Batch(Wire):
    """Jobs that were accepted together. It has ended when all of them have, however that was."""

    id: str
    status: BatchStatus
    created_at: datetime
    finished_at: datetime | None = None
    labels: dict[str, str]
    counts: BatchCounts
    job_ids: list[str] | None = Field(
        default=None,
        description="In the order of the items; one that was purged or has expired is 404. Left out in lists.",
    )
    links: BatchLinks


class BatchPage(Wire):
    """Some batches, newest first."""

    data: list[Batch]
    next_cursor: str | None = Field(default=None, description="Give it as `after` for the next page.")
