"""What happens to a job, as events: their types, and how any number of readers follow them live.

Stored events come from the store; what is here is the live end. A reader has a bounded buffer and
is cut off when it overflows: it slows neither the job nor other readers, and can resume.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from service.engine.progress import Happening, Notice, Progress, TensorCompleted
from service.jobs.job import Job, Status

PROGRESS = "job.progress"
TENSOR_COMPLETED = "tensor.completed"
WARNING = "job.warning"
RESUMED = "job.resumed"
TOO_SLOW = "reader.too_slow"
SERVER_DRAINING = "server.draining"

#: The event that a transition into a state emits. Cancelling is told by the answer to the call.
EVENT_OF_STATUS = {
    Status.QUEUED: "job.queued",
    Status.RUNNING: "job.started",
    Status.SUCCEEDED: "job.succeeded",
    Status.FAILED: "job.failed",
    Status.CANCELLED: "job.cancelled",
}
TERMINAL_EVENTS = frozenset(name for status, name in EVENT_OF_STATUS.items() if status.is_terminal)
_TYPE_OF: dict[type, str] = {Progress: PROGRESS, TensorCompleted: TENSOR_COMPLETED, Notice: WARNING}

#: Ids after a restart begin at the next multiple, so that they exceed those of progress events,
#: which earlier readers have seen but nobody has stored.
ID_EPOCH = 1_000_000
#: Events a reader may lag behind.
READER_LIMIT = 4096
#: Events read from the store at once.
PAGE = 500


@dataclass(frozen=True, slots=True)
class Merged:
    """Where an event stands in the stream of its job's batch: `id` grows within the batch, behind `is_last` is nothing.

    `index` is that of the job among the batch's items. An event that is read back never says that it is the last.
    """

    batch_id: str
    index: int
    id: int
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job.

    `id` grows within the job; it is None for what is said to one reader only (`reader.too_slow`,
    `server.draining`). `data` is JSON without `job_id` and `at`: `status` and, when queued,
    `queue_position` for changes of state; the fields of Progress, TensorCompleted or Notice
    without those that are None otherwise. `job` is the whole job in terminal events. `merged` is
    there when the job belongs to a batch and the event is new or was read for the batch.
    """

    id: int | None
    type: str
    job_id: str
    at: datetime
    data: dict[str, Any]
    job: Job | None = None
    merged: Merged | None = None

    def in_batch(self) -> Event:
        """The event as the stream of its batch has it: under its id there."""
        return replace(self, id=self.merged.id) if self.merged else self

    @property
    def is_terminal(self) -> bool:
        """Whether nothing follows for this job."""
        return self.type in TERMINAL_EVENTS

    @property
    def is_stored(self) -> bool:
        """Whether it can be replayed."""
        return self.id is not None and self.type != PROGRESS

    def is_newer_of(self, other: Event) -> bool:
        """Whether it makes another one superfluous: of a job's progress the newest is enough."""
        return self.type == other.type == PROGRESS and self.job_id == other.job_id


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing has happened for a while; the stream is alive."""


def describe(happening: Happening) -> tuple[str, dict[str, Any]]:
    """The event type and data of what the engine reported."""
    fields = ((name, getattr(happening, name)) for name in happening.__dataclass_fields__)
    data = {name: value for name, value in fields if value is not None}
    if isinstance(happening, TensorCompleted):
        data["shape"] = list(happening.shape)  # as it is read back from the store
    return _TYPE_OF[type(happening)], data


class Reader:
    """The buffer of one live reader of a job or a batch; everything on the event loop."""

    def __init__(self, subject: str, limit: int = READER_LIMIT) -> None:
        self._subject = subject
        self._limit = limit
        self._buffer: deque[Event] = deque()
        self._last: Event | None = None
        self._wake = asyncio.Event()

    def push(self, event: Event) -> None:
        """Add an event, or cut the reader off when its buffer is full; never waits."""
        if self._last is not None:
            return
        if self._buffer and event.is_newer_of(self._buffer[-1]):
            self._buffer[-1] = event
        elif len(self._buffer) >= self._limit:
            self.end(TOO_SLOW)
        else:
            self._buffer.append(event)
        self._wake.set()

    def end(self, type_: str) -> None:
        """Nothing more comes behind what is buffered but this, which belongs to no job's log."""
        if self._last is None:
            self._last = Event(None, type_, self._subject, datetime.now(UTC), {})
            self._wake.set()

    @property
    def has_events(self) -> bool:
        """Whether the next one is here already."""
        return bool(self._buffer)

    async def next(self, silence_s: float) -> Event | Silence:
        """The next event, or Silence when none came for so long."""
        if not self._buffer and self._last is None:
            self._wake.clear()
            try:
                async with asyncio.timeout(silence_s):
                    await self._wake.wait()
            except TimeoutError:
                return Silence()
        if self._buffer:
            return self._buffer.popleft()
        assert self._last is not None, "it is set when a reader is woken without an event"
        return self._last


class LiveLog:
    """The live end of the events of a job or a batch: gives out ids, and hands published events to readers."""

    def __init__(self, subject: str, *, next_id: int, last_stored_id: int, reader_limit: int = READER_LIMIT) -> None:
        self._subject = subject
        self._next_id = next_id
        self._reader_limit = reader_limit
        self._readers: set[Reader] = set()
        self._closing: str | None = None
        #: The newest event that readers can replay.
        self.last_stored_id = last_stored_id

    def event(self, type_: str, data: dict[str, Any], job: Job | None = None) -> Event:
        """A new event with the next id; nobody sees it before `publish`."""
        event = Event(self._next_id, type_, self._subject, datetime.now(UTC), data, job)
        self._next_id += 1
        return event

    def publish(self, event: Event) -> None:
        """Show an event, which is stored if it is to be, to all readers."""
        if event.is_stored and event.id is not None:
            self.last_stored_id = event.id
        for reader in self._readers:
            reader.push(event)

    def subscribe(self) -> Reader:
        """A reader of all that is published from now on."""
        reader = Reader(self._subject, self._reader_limit)
        if self._closing is not None:
            reader.end(self._closing)
        self._readers.add(reader)
        return reader

    def unsubscribe(self, reader: Reader) -> None:
        """Forget a reader."""
        self._readers.discard(reader)

    def close(self, reason: str) -> None:
        """End all readers, and those to come, with an event of this type."""
        self._closing = reason
        for reader in self._readers:
            reader.end(reason)

    @property
    def readers(self) -> int:
        """How many follow."""
        return len(self._readers)


def next_epoch(last_stored_id: int) -> int:
    """The first id that a process gives out which goes on with a job of an earlier one."""
    return (last_stored_id // ID_EPOCH + 1) * ID_EPOCH


class Following:
    """What one reader follows: all that is stored behind an id, then all that happens, without gap or duplicate.

    To be closed when the reader goes.
    """

    def __init__(
        self,
        find_log: Callable[[], LiveLog | None],
        read_page: Callable[[int], Awaitable[list[Event]]],
        *,
        after: int,
        silence_s: float,
        is_last: Callable[[Event], bool] = lambda event: event.is_terminal,
    ) -> None:
        """`find_log` gives the live end while there is one; behind what `is_last` nothing comes."""
        self._find_log = find_log
        self._read_page = read_page
        self._after = after
        self._silence_s = silence_s
        self._is_last = is_last
        self._page: deque[Event] = deque()
        self._reader: Reader | None = None
        self._items = self._follow()

    def __aiter__(self) -> Following:
        """Itself."""
        return self

    async def __anext__(self) -> Event | Silence:
        """The next event, or Silence when none came for a while."""
        return await anext(self._items)

    async def aclose(self) -> None:
        """Let go of what is followed."""
        await self._items.aclose()

    @property
    def has_more(self) -> bool:
        """Whether the next event is here already, and need not be waited for."""
        return bool(self._page) or (self._reader is not None and self._reader.has_events)

    async def _follow(self) -> AsyncGenerator[Event | Silence, None]:
        # Between the last look for the log and the subscription nothing is awaited, so nothing can be published.
        while (log := self._find_log()) is None or self._after < log.last_stored_id:
            last = log.last_stored_id if log is not None else None
            self._page.extend(await self._read_page(self._after))
            if not self._page:
                if last is None:
                    return
                # What was stored up to there has been deleted since: with a purged job, or an expired log.
                self._after = max(self._after, last)
            while self._page:
                event = self._page.popleft()
                yield event
                self._after = event.id or self._after
                if self._is_last(event):
                    self._page.clear()
                    return
        self._reader = log.subscribe()
        try:
            while True:
                item = await self._reader.next(self._silence_s)
                yield item
                if isinstance(item, Event) and (item.id is None or self._is_last(item)):
                    return
        finally:
            log.unsubscribe(self._reader)
