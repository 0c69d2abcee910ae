"""What one running application holds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from anyio import CapacityLimiter
from fastapi import Request

from service.api.metrics import Metrics
from service.api.stalls import StallMonitor
from service.api.tracing import Tracing
from service.jobs.batch import Batch
from service.jobs.job import Job
from service.jobs.manager import JobManager
from service.settings import Settings

T = TypeVar("T")

#: Tables computed at once; each call has all threads of the backend.
TABLES_AT_ONCE = 2
#: Threads that store what is uploaded; a slow disk must not take those of all other calls.
UPLOAD_THREADS = 8


@dataclass
class ApiState:
    """Made when the application starts, on its event loop."""

    settings: Settings
    manager: JobManager
    tracing: Tracing | None = None
    stalls: StallMonitor = field(default_factory=StallMonitor)
    metrics: Metrics = field(init=False)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    tables: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(TABLES_AT_ONCE))
    uploads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(UPLOAD_THREADS))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.manager, self.stalls, by_tenant=self.settings.asks_for_keys)

    async def drain(self) -> None:
        """Take no more jobs, answer all who wait, and let running jobs stop at their next block."""
        self.closing.set()
        await self.manager.drain(self.settings.drain_timeout_s)

    async def wait(self, call: Request, job_id: str, seconds: float, tenant: str | None = None) -> Job:
        """The tenant's job when it has ended, after so many seconds, or when the server closes or the caller has gone.

        None is any tenant.
        """
        manager = self.manager
        return await self._wait(
            call, manager.jobs.wait(job_id, seconds, tenant), lambda: manager.jobs.get(job_id, tenant)
        )

    async def wait_for_batch(self, call: Request, batch_id: str, seconds: float, tenant: str | None = None) -> Batch:
        """As `wait`, for a batch."""
        batches = self.manager.batches
        return await self._wait(call, batches.wait(batch_id, seconds, tenant), lambda: batches.get(batch_id, tenant))

    async def _wait(self, call: Request, end: Coroutine[Any, Any, T], now: Callable[[], Awaitable[T]]) -> T:
        ended = asyncio.create_task(end)
        others = {asyncio.create_task(self.closing.wait()), asyncio.create_task(_hung_up(call))}
        try:
            await asyncio.wait({ended, *others}, return_when=asyncio.FIRST_COMPLETED)
            return await ended if ended.done() else await now()
        finally:
            for task in (ended, *others):
                task.cancel()


async def _hung_up(call: Request) -> None:
    """Returns when the caller has gone; the body has been read."""
    while (await call.receive())["type"] != "http.disconnect":
        pass
