"""A batch: jobs that were accepted together, and the one stream of all their events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from service.jobs.events import Event, LiveLog, Merged
from service.jobs.job import Status

_MOVING = (Status.QUEUED, Status.RUNNING)


class BatchStatus(StrEnum):
    """Where a batch stands."""

    IN_PROGRESS = "in_progress"
    CANCELLING = "cancelling"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Batch:
    """The record of a batch. `job_ids` are in the order of the items; `counts` has only what is there."""

    id: str
    tenant: str
    labels: dict[str, str]
    job_ids: tuple[str, ...]
    created_at: datetime
    finished_at: datetime | None = None
    counts: Mapping[Status, int] = field(default_factory=dict)

    @property
    def status(self) -> BatchStatus:
        """What its jobs make of it."""
        if self.finished_at is not None:
            return BatchStatus.ENDED
        is_cancelling = Status.CANCELLING in self.counts and not any(status in self.counts for status in _MOVING)
        return BatchStatus.CANCELLING if is_cancelling else BatchStatus.IN_PROGRESS


class LiveBatch:
    """A batch with jobs that have not ended; everything on the event loop."""

    def __init__(self, batch_id: str, log: LiveLog, to_end: int, on_end: Callable[[str], None]) -> None:
        """`to_end` jobs have yet to end; `on_end` is called when the last one's end is stored and before it is seen."""
        self.log = log
        self.ended = asyncio.Event()
        self._id = batch_id
        self._to_end = to_end
        self._on_end = on_end

    def merge(self, event: Event, index: int) -> Event:
        """The event of an item with its place in the stream of all."""
        self._to_end -= event.is_terminal
        own = self.log.event(event.type, event.data)
        assert own.id is not None, "what a log makes has an id"
        return replace(event, merged=Merged(self._id, index, own.id, is_last=event.is_terminal and not self._to_end))

    def publish(self, event: Event) -> None:
        """Show a merged event, which is stored if it is to be."""
        assert event.merged is not None, "it comes from merge"
        if event.merged.is_last:
            self._on_end(self._id)
            self.ended.set()
        self.log.publish(event.in_batch())


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job stands in its batch."""

    batch: LiveBatch
    index: int

    def merge(self, event: Event) -> Event:
        """See LiveBatch."""
        return self.batch.merge(event, self.index)
