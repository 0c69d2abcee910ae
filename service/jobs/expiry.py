"""Removes what is kept no longer, now and then, as long as the server runs."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime

from service.errors import ArrowQuantError
from service.jobs.collector import Collector
from service.jobs.retention import Rules

logger = logging.getLogger(__name__)

#: Between two looks, at most; what is kept for less is looked at more often.
INTERVAL_S = 60.0


async def expire(collector: Collector, rules: Rules) -> None:
    """Sweep for ever by these rules; a line in the log tells what each sweep removed."""
    while True:
        await asyncio.sleep(min(INTERVAL_S, (rules.shortest_s or INTERVAL_S * 10) / 10))
        try:
            swept = await collector.sweep(rules, datetime.now(UTC))
        except ArrowQuantError as error:
            logger.warning("what is kept no longer could not be removed, trying again later: %s", error.detail)
        else:
            logger.log(logging.INFO if swept.count else logging.DEBUG, "kept no longer: %s", swept)
