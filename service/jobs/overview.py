"""Looks over the jobs in memory, a few at once: with tens of thousands the event loop must serve others in between."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

from service.engine.clock import Clock
from service.jobs.job import Status
from service.jobs.live import LiveJob

AT_ONCE = 500


@dataclass(slots=True)
class Overview:
    """Jobs by tenant and status, readers of their events, and the clocks of those that have started."""

    open_jobs: Counter[tuple[str, str]] = field(default_factory=Counter)
    readers: int = 0
    clocks: list[Clock] = field(default_factory=list)


async def look_over(live: Mapping[str, LiveJob]) -> Overview:
    """The jobs as each stood when it was looked at; the clocks are of those that have not ended when it returns."""
    found = Overview()
    started: list[tuple[str, LiveJob]] = []
    jobs = iter(list(live.items()))
    while some := list(islice(jobs, AT_ONCE)):
        for job_id, job in some:
            found.open_jobs[job.tenant, job.status.value] += 1
            found.readers += job.log.readers
            if job.status is not Status.QUEUED:
                started.append((job_id, job))
        await asyncio.sleep(0)
    # What has ended meanwhile is among the ended ones already: it must not count twice.
    found.clocks = [job.clock for job_id, job in started if job_id in live]
    return found
