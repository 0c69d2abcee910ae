"""From what is submitted to jobs that wait: checked, claimed, stored in one transaction, shown, queued."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import PurePath

from service.errors import QueueFull
from service.jobs.admission import Admission, Admitted, Claims, target_pointers
from service.jobs.batch import Batch
from service.jobs.batches import Batches
from service.jobs.database import Database
from service.jobs.events import EVENT_OF_STATUS, READER_LIMIT, Event, LiveLog
from service.jobs.execution import Execution
from service.jobs.job import Job, Status
from service.jobs.limited_threads import LimitedThreads
from service.jobs.live import LiveJob
from service.jobs.quotas import NO_LIMITS, Limits, check_room
from service.jobs.sources import pointing
from service.jobs.submission import Submission
from service.jobs.webhooks.webhooks import Webhooks

#: Makes a job live: its record, its log, the folders that it alone may write to.
Adopt = Callable[[Job, LiveLog, tuple[PurePath, ...]], LiveJob]


class Intake:
    """Accepts jobs; everything on the event loop."""

    def __init__(
        self,
        database: Database,
        admission: Admission,
        webhooks: Webhooks,
        execution: Execution,
        batches: Batches,
        store_threads: LimitedThreads,
        live: Mapping[str, LiveJob],
        adopt: Adopt,
        forget: Callable[[Job], None],
        *,
        max_queued_jobs: int,
        kept_places: int = 0,
        tenant_limits: Limits = NO_LIMITS,
        reader_limit: int = READER_LIMIT,
    ) -> None:
        """`live` are the jobs that have not ended; `forget` undoes `adopt`.

        `kept_places` of the queue are for the first waiting job of a tenant.
        """
        self._database = database
        self._admission = admission
        self._webhooks = webhooks
        self._execution = execution
        self._batches = batches
        self._store_threads = store_threads
        self._live = live
        self._adopt = adopt
        self._forget = forget
        self._max_queued_jobs = max_queued_jobs
        self._kept_places = kept_places
        self._tenant_limits = tenant_limits
        self._reader_limit = reader_limit
        self._admitting: Counter[str] = Counter()  # by tenant

    async def take(self, submission: Submission, check_open: Callable[[], None]) -> tuple[list[Job], Batch | None]:
        """All of a submission's jobs, stored and queued, and their batch.

        Raises what `check_open` raises, QueueFull, TooManyOpenJobs, StorageQuotaExceeded, or why a
        request cannot be carried out; then nothing is left of any.
        """
        count = len(submission.requests)
        with self._room_for(count, submission.tenant):
            await self._webhooks.check(submission)
            admitted = await asyncio.to_thread(submission.admit_local, self._admission)
            if admitted is None:
                admitted = await self._store_threads.run(partial(submission.admit, self._admission))
            await self._check_quotas(submission.tenant, count)
            check_open()
            jobs, batch, live_jobs = self._accept(submission, admitted)
            try:
                events = self._queued_events(submission, admitted, live_jobs)
                kept = submission.kept(jobs, batch)
                is_told = await self._database.run(lambda store: store.add_all(jobs, events, batch, kept))
            except BaseException:
                self._unaccept(jobs, batch)
                raise
        if is_told:
            self._webhooks.deliverer.wake()
        for live, event in zip(live_jobs, events, strict=True):
            live.accepted(event)
        for live, entry in zip(live_jobs, admitted, strict=True):
            if live.status is Status.QUEUED:
                self._execution.enqueue(live, entry.device, entry.memory_bytes)
        return jobs, batch

    @contextmanager
    def _room_for(self, count: int, tenant: str) -> Iterator[None]:
        """Hold places in the queue until the jobs are in it; raises QueueFull."""
        waiting = self._execution.depth + self._admitting.total()
        own = self._execution.depth_of(tenant) + self._admitting[tenant]
        most = self._max_queued_jobs - (self._kept_places if own + count > 1 else 0)
        if waiting + count > most:
            raise QueueFull(
                f"{waiting} jobs wait already, {own} of them yours, and {most} may: there is no room for {count} more, "
                "try again later"
            )
        self._admitting[tenant] += count
        try:
            yield
        finally:
            self._admitting[tenant] -= count
            self._admitting += Counter()  # forgets those at zero

    async def _check_quotas(self, tenant: str, new_jobs: int) -> None:
        """Raise TooManyOpenJobs or StorageQuotaExceeded; up to the next `await` it then holds."""
        usage = await self._database.run(lambda store: store.usage(tenant))
        open_jobs = sum(live.tenant == tenant for live in self._live.values())
        limits = usage.overrides.over(self._tenant_limits)
        check_room(limits, open_jobs=open_jobs, new_jobs=new_jobs, stored_bytes=usage.stored_bytes)

    def _accept(
        self, submission: Submission, admitted: Sequence[Admitted]
    ) -> tuple[list[Job], Batch | None, list[LiveJob]]:
        """The new jobs, which from now on hold their targets; nothing is awaited between check and claim."""
        claims = Claims(target for live in self._live.values() for target in live.targets)
        for index, (request, entry) in enumerate(zip(submission.requests, admitted, strict=True)):
            for pointer, target in zip(target_pointers(request), entry.targets, strict=True):
                with submission.at(index), pointing(pointer):
                    claims.add(target)
        # The time first: a job's id is never of an earlier millisecond than its created_at.
        jobs = submission.jobs(admitted, datetime.now(UTC))
        batch = submission.batch(jobs)
        if batch is not None:
            self._batches.open(batch.id, len(jobs))
        live_jobs = []
        for job, entry in zip(jobs, admitted, strict=True):
            log = LiveLog(job.id, next_id=1, last_stored_id=0, reader_limit=self._reader_limit)
            live_jobs.append(self._adopt(job, log, entry.targets))
        return jobs, batch, live_jobs

    def _unaccept(self, jobs: Sequence[Job], batch: Batch | None) -> None:
        for job in jobs:
            self._forget(job)
        if batch is not None:
            self._batches.forget(batch.id)

    def _queued_events(
        self, submission: Submission, admitted: Sequence[Admitted], live_jobs: Sequence[LiveJob]
    ) -> list[Event]:
        places = [
            (request.priority, entry.device) for request, entry in zip(submission.requests, admitted, strict=True)
        ]
        ahead = {place: self._execution.ahead_of(submission.tenant, *place) for place in set(places)}
        type_, status = EVENT_OF_STATUS[Status.QUEUED], Status.QUEUED.value
        return [
            live.event(type_, {"status": status, "queue_position": ahead[place] + others})
            for live, place, others in zip(live_jobs, places, submission.order(), strict=True)
        ]
