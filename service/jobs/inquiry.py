"""All that can be asked of jobs: one or many of them, what happened to one, and what it measured."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime

from service.engine.report import RunReport
from service.errors import NotFinished, NotFound
from service.jobs.database import Database
from service.jobs.events import Event, Following, LiveLog
from service.jobs.folders import Folders
from service.jobs.job import Job, Status
from service.jobs.leases import Leases
from service.jobs.live import LiveJob
from service.jobs.publisher import load_report
from service.jobs.store import Store
from service.storage.faults import storage_faults


class Inquiry:
    """Answers from memory what it holds of jobs that have not ended, all else from the store."""

    def __init__(
        self, live: Mapping[str, LiveJob], database: Database, folders: Folders, leases: Leases, *, silence_s: float
    ) -> None:
        """`live` are the jobs that have not ended, kept by another; `silence_s` is after what a stream says so."""
        self._live = live
        self._database = database
        self._folders = folders
        self._leases = leases
        self._silence_s = silence_s

    def live(self, job_id: str, tenant: str | None = None) -> LiveJob | None:
        """The job that has not ended, if it is this tenant's; None is any."""
        live = self._live.get(job_id)
        return live if live is not None and tenant in (None, live.job.tenant) else None

    async def get(self, job_id: str, tenant: str | None = None) -> Job:
        """The job of this id, as it stands; raises NotFound, also when it is another tenant's. None is any tenant."""
        live = self.live(job_id, tenant)
        if live is not None:
            return live.job
        job = await self._database.run(lambda store: store.get(job_id, tenant))
        if job is None:
            raise NotFound(f"there is no job {job_id!r}")
        return job

    async def find(
        self,
        *,
        tenant: str | None = None,
        status: Status | None = None,
        kind: str | None = None,
        batch_id: str | None = None,
        label: tuple[str, str] | None = None,
        created_after: datetime | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> tuple[list[Job], str | None]:
        """A tenant's jobs, newest first, behind the cursor `after`; and the cursor of the next page, if there is."""

        def look(store: Store) -> tuple[list[Job], str | None]:
            return store.find(
                tenant=tenant,
                status=status,
                kind=kind,
                batch_id=batch_id,
                label=label,
                created_after=created_after,
                limit=limit,
                after=after,
            )

        jobs, cursor = await self._database.run(look)
        return [live.job if (live := self._live.get(job.id)) else job for job in jobs], cursor

    async def wait(self, job_id: str, timeout_s: float, tenant: str | None = None) -> Job:
        """The job when it has ended, or after `timeout_s` as it then stands; raises NotFound."""
        live = self.live(job_id, tenant)
        if live is not None:
            try:
                await asyncio.wait_for(live.ended.wait(), timeout_s)
            except TimeoutError:
                return live.job
        return await self.get(job_id, tenant)

    async def report(self, job_id: str, tenant: str | None = None) -> RunReport:
        """What the job measured; raises NotFound, or NotFinished when it has not succeeded."""

        def load() -> RunReport:
            with storage_faults("reading the report"):
                return load_report(self._folders.report(job_id))

        with self._leases.held(job_id):
            job = await self.get(job_id, tenant)
            if job.status is not Status.SUCCEEDED:
                raise NotFinished(f"job {job_id} is {job.status}, and only a job that has succeeded has a report")
            return await asyncio.to_thread(load)

    async def events(self, job_id: str, *, after: int = 0, limit: int = 500) -> list[Event]:
        """Stored events behind the id `after`; none for a job that does not exist."""
        return await self._database.run(lambda store: store.events(job_id, after=after, limit=limit))

    def follow(self, job_id: str, *, after: int = 0) -> Following:
        """Stored events behind `after`, then all that happens, until the job ends; Silence now and then.

        A last event without an id says that the reader was too slow, or that the server stops.
        Ends at once for a job that does not exist: ask `get` first. Close it (`aclosing`) when
        the reader goes.
        """

        def find_log() -> LiveLog | None:
            live = self._live.get(job_id)
            return live.log if live is not None else None

        async def read_page(last: int) -> list[Event]:
            return await self.events(job_id, after=last)

        return Following(find_log, read_page, after=after, silence_s=self._silence_s)
