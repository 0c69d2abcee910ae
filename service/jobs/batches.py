"""All that can be done with batches once they are accepted: find, follow, cancel, purge."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from service.errors import NotFound, NotTerminal
from service.jobs import batch_table
from service.jobs.batch import Batch, LiveBatch, Place
from service.jobs.database import Database
from service.jobs.events import Event, Following, LiveLog, next_epoch


class Batches:
    """The batches of one data folder; everything on the event loop."""

    def __init__(
        self,
        database: Database,
        cancel: Callable[[Sequence[str]], Awaitable[None]],
        erase: Callable[[Sequence[str]], Awaitable[None]],
        *,
        silence_s: float,
        reader_limit: int,
    ) -> None:
        """`cancel` ends all jobs of a list that have not ended; `erase` deletes ended ones, files included, or none."""
        self._database = database
        self._cancel = cancel
        self._erase = erase
        self._silence_s = silence_s
        self._reader_limit = reader_limit
        self._live: dict[str, LiveBatch] = {}

    # --- for the manager, which accepts batches and goes on with those of an earlier server ---

    def open(self, batch_id: str, jobs: int) -> LiveBatch:
        """A new batch of so many jobs."""
        log = LiveLog(batch_id, next_id=1, last_stored_id=0, reader_limit=self._reader_limit)
        return self._adopt(batch_id, jobs, log)

    def reopen(self, batch_id: str, jobs: int, last_event_id: int) -> LiveBatch:
        """A batch of an earlier server of which so many jobs have not ended."""
        first = next_epoch(last_event_id)
        log = LiveLog(batch_id, next_id=first, last_stored_id=last_event_id, reader_limit=self._reader_limit)
        return self._adopt(batch_id, jobs, log)

    def place(self, batch_id: str, index: int) -> Place:
        """Where a job stands in a batch that is open."""
        return Place(self._live[batch_id], index)

    def forget(self, batch_id: str) -> None:
        """Hold a batch no longer."""
        del self._live[batch_id]

    def close(self, reason: str) -> None:
        """End all streams with an event of this type."""
        for live in self._live.values():
            live.log.close(reason)

    @property
    def readers(self) -> int:
        """How many streams are open on batches that have not ended."""
        return sum(live.log.readers for live in self._live.values())

    # --- for clients ---

    async def get(self, batch_id: str, tenant: str | None = None) -> Batch:
        """The batch of this id as it stands; raises NotFound, also when it is another tenant's. None is any tenant."""
        batch = await self._database.read(lambda db: batch_table.get(db, batch_id))
        if batch is None or tenant not in (None, batch.tenant):
            raise NotFound(f"there is no batch {batch_id!r}")
        return batch

    async def find(
        self, *, tenant: str | None = None, limit: int = 50, after: str | None = None
    ) -> tuple[list[Batch], str | None]:
        """A tenant's batches, newest first, behind the cursor `after`; and the cursor of the next page, if there is."""
        return await self._database.read(lambda db: batch_table.find(db, tenant=tenant, limit=limit, after=after))

    async def wait(self, batch_id: str, timeout_s: float, tenant: str | None = None) -> Batch:
        """The batch when all its jobs have ended, or after `timeout_s` as it then stands; raises NotFound."""
        batch = await self.get(batch_id, tenant)
        live = self._live.get(batch_id)
        if live is None:
            return batch
        with suppress(TimeoutError):
            await asyncio.wait_for(live.ended.wait(), timeout_s)
        return await self.get(batch_id, tenant)

    async def cancel(self, batch_id: str, tenant: str | None = None) -> Batch:
        """End all jobs that have not ended, as a cancel of each would; raises NotFound."""
        batch = await self.get(batch_id, tenant)
        await self._cancel(batch.job_ids)
        return await self.get(batch_id, tenant)

    async def purge(self, batch_id: str, tenant: str | None = None) -> None:
        """Delete an ended batch and all that belongs to its jobs; raises NotFound, NotTerminal or JobInUse.

        Outputs that were written to an address of their own stay: they are the user's.
        """
        batch = await self.get(batch_id, tenant)
        if batch_id in self._live:
            raise NotTerminal(f"batch {batch_id} has not ended: cancel it first")
        # The batch last: what a crash leaves of it can be purged again.
        await self._erase(batch.job_ids)
        await self._database.change(lambda db: batch_table.delete(db, batch_id))

    async def events(self, batch_id: str, *, after: int = 0, limit: int = 500) -> list[Event]:
        """Stored events of all jobs behind the id `after`, under their ids in the batch; none for an unknown batch."""
        return await self._database.read(lambda db: batch_table.events(db, batch_id, after=after, limit=limit))

    def follow(self, batch_id: str, *, after: int = 0) -> Following:
        """As of a job (see JobManager), until the last job has ended."""

        def find_log() -> LiveLog | None:
            live = self._live.get(batch_id)
            return live.log if live is not None else None

        def is_last(event: Event) -> bool:
            return event.merged is not None and event.merged.is_last

        async def read_page(last: int) -> list[Event]:
            return await self.events(batch_id, after=last)

        return Following(find_log, read_page, after=after, silence_s=self._silence_s, is_last=is_last)

    def _adopt(self, batch_id: str, jobs: int, log: LiveLog) -> LiveBatch:
        self._live[batch_id] = LiveBatch(batch_id, log, jobs, self.forget)
        return self._live[batch_id]
