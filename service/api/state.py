"""What one running application holds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from anyio import CapacityLimiter

from service.api.stalls import StallMonitor
from service.jobs.job import Job
from service.jobs.manager import JobManager
from service.settings import Settings

#: Tables computed at once; each call has all threads of the backend.
TABLES_AT_ONCE = 2
#: Threads that store what is uploaded; a slow disk must not take those of all other calls.
UPLOAD_THREADS = 8


@dataclass
class ApiState:
    """Made when the application starts, on its event loop."""

    settings: Settings
    manager: JobManager
    stalls: StallMonitor = field(default_factory=StallMonitor)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    tables: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(TABLES_AT_ONCE))
    uploads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(UPLOAD_THREADS))

    async def drain(self) -> None:
        """Take no more jobs, answer all who wait, and let running jobs stop at their next block."""
        self.closing.set()
        await self.manager.drain(self.settings.drain_timeout_s)

    async def wait(self, job_id: str, seconds: float, tenant: str | None = None) -> Job:
        """The tenant's job when it has ended, after so many seconds, or when the server closes; None is any tenant."""
        ended = asyncio.create_task(self.manager.wait(job_id, seconds, tenant))
        closing = asyncio.create_task(self.closing.wait())
        try:
            await asyncio.wait({ended, closing}, return_when=asyncio.FIRST_COMPLETED)
            return await ended if ended.done() else await self.manager.get(job_id, tenant)
        finally:
            ended.cancel()
            closing.cancel()
