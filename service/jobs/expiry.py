"""Removes what nobody has used for a while, now and then, as long as the server runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from service.errors import ArrowQuantError
from service.jobs.blobs import Blobs
from service.jobs.job import Job
from service.jobs.sources import blobs_used

logger = logging.getLogger(__name__)

#: Between two looks, at most; what is kept for less is looked at more often.
INTERVAL_S = 600.0


async def expire_blobs(blobs: Blobs, unfinished: Callable[[], Iterable[Job]]) -> None:
    """Sweep blobs for ever; those that `unfinished` jobs use stay, as if they had been used just now."""
    while True:
        await asyncio.sleep(min(INTERVAL_S, blobs.ttl_s / 10))
        in_use = {key for job in unfinished() for key in blobs_used(job)}
        try:
            await asyncio.to_thread(blobs.sweep, in_use)
        except ArrowQuantError as error:
            logger.warning("unused blobs could not be removed, trying again later: %s", error.detail)
