"""Sends what is due, again and again until it has arrived or nothing more is tried; across restarts, from the store.

A few attempts are under way at once, of them fewer for any tenant, fewer still to any one receiver, and one for any
job: so a receiver that is dead or slow holds up its own messages alone.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from service.errors import ArrowQuantError, LookupsBusy
from service.jobs.database import Database
from service.jobs.standing import StandingTask
from service.jobs.webhooks import delivery_table, secret_table
from service.jobs.webhooks.delivery import Answer, Due, judge
from service.jobs.webhooks.metrics import WebhookMetrics
from service.jobs.webhooks.signing import signed_headers
from service.logs import Bound

if TYPE_CHECKING:
    from service.jobs.webhooks.sender import Sender

logger = logging.getLogger(__name__)

AT_ONCE = 64
AT_ONCE_OF_TENANT = 32
AT_ONCE_TO_PLACE = 4
#: Between two looks into the store at most: clocks jump.
LOOK_S = 60.0
#: Until a name is looked up again that could not be, because others were.
BUSY_S = 5.0
#: Between attempts when the database cannot be used.
RETRY_S = 1.0


class Deliverer:
    """The task that delivers; everything on the event loop."""

    def __init__(
        self, database: Database, sender: Sender, delays_s: tuple[float, ...], registry: CollectorRegistry
    ) -> None:
        """`delays_s` are those between an attempt and the next; behind the last of them there is one more attempt."""
        self._database = database
        self._sender = sender
        self._delays_s = delays_s
        self._wake = asyncio.Event()
        self._flights: dict[asyncio.Task[None], Due] = {}
        self._task: StandingTask | None = None
        self._metrics = WebhookMetrics(registry, lambda: len(self._flights))

    def start(self) -> None:
        """Deliver from now on what is in the store, and what will be."""
        self._task = StandingTask("webhooks", self._run)

    def wake(self) -> None:
        """Look at once whether something is due."""
        self._wake.set()

    async def stop(self, grace_s: float) -> None:
        """Begin no more attempts, and cut those off that take longer; they are made again at the next start."""
        if self._task is not None:
            await self._task.stop()
        flights = list(self._flights)
        if flights:
            await asyncio.wait(flights, timeout=grace_s)
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                # One moment for both looks: what becomes due between them is seen by the second.
                now = datetime.now(UTC)
                while await self._begin_due(now):
                    pass
                delay_s = await self._seconds_to_next(now)
            except ArrowQuantError as error:
                logger.warning("webhooks cannot be read from the job database, trying again: %s", error.detail)
                delay_s = RETRY_S
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._wake.wait()

    async def _begin_due(self, now: datetime) -> bool:
        """Begin as many attempts as there is room for; whether there may be more to begin."""
        free = AT_ONCE - len(self._flights)
        if not free:
            return False
        flights = self._flights.values()
        jobs = {due.job_id for due in flights}
        places = _full((due.place for due in flights), AT_ONCE_TO_PLACE)
        tenants = _full((due.tenant for due in flights), AT_ONCE_OF_TENANT)
        found = await self._database.read(
            lambda db: delivery_table.due(db, now, jobs=jobs, places=places, tenants=tenants, limit=free)
        )
        for due in found:
            if self._may_begin(due):
                self._begin(due)
        return bool(found)

    def _may_begin(self, due: Due) -> bool:
        flights = self._flights.values()
        return (
            all(other.job_id != due.job_id for other in flights)
            and sum(other.place == due.place for other in flights) < AT_ONCE_TO_PLACE
            and sum(other.tenant == due.tenant for other in flights) < AT_ONCE_OF_TENANT
        )

    def _begin(self, due: Due) -> None:
        flight = asyncio.create_task(self._deliver(due), name=due.id)
        self._flights[flight] = due
        flight.add_done_callback(self._landed)

    def _landed(self, flight: asyncio.Task[None]) -> None:
        crash = None if flight.cancelled() else flight.exception()
        if crash is None:
            self._free(flight)
            return
        logger.error("webhook %s: what came of it could not be noted", flight.get_name(), exc_info=crash)
        # It is still due: at once it would be sent again and again.
        asyncio.get_running_loop().call_later(LOOK_S, self._free, flight)

    def _free(self, flight: asyncio.Task[None]) -> None:
        del self._flights[flight]
        self._wake.set()

    async def _deliver(self, due: Due) -> None:
        begun = time.monotonic()
        try:
            answer = await self._attempt(due)
        except LookupsBusy:
            until = datetime.now(UTC) + timedelta(seconds=BUSY_S)
            await self._change(lambda db: delivery_table.postpone(db, due, until))
            return
        seconds = time.monotonic() - begun
        verdict = judge(answer, due.attempts + 1, self._delays_s)
        await self._change(lambda db: delivery_table.settle(db, due, verdict))
        self._metrics.ended(verdict, seconds)
        with Bound(job_id=due.job_id, tenant=due.tenant):
            logger.info("webhook %s is %s: %s", due.id, verdict.status, answer.error or answer.status_code)

    async def _attempt(self, due: Due) -> Answer:
        """What came of an attempt; a crash is one that failed, so that its delivery goes on by its schedule.

        Raises LookupsBusy when none could be made.
        """
        (outcome,) = await asyncio.gather(self._send(due), return_exceptions=True)
        if isinstance(outcome, Answer):
            return outcome
        if isinstance(outcome, LookupsBusy):
            raise outcome
        logger.error("webhook %s: the attempt failed unexpectedly", due.id, exc_info=outcome)
        return Answer(None, "the service has a fault; the server's log tells more")

    async def _send(self, due: Due) -> Answer:
        keys = await self._secrets(due.tenant)
        if not keys:
            return Answer(None, f"tenant {due.tenant} has no signing secret any more")
        headers = signed_headers(due.id, int(time.time()), due.body, keys)
        return await self._sender.send(due.url, headers, due.body, due.tenant)

    async def _secrets(self, tenant: str) -> list[bytes]:
        while True:
            try:
                return await self._database.read(lambda db: secret_table.usable(db, tenant))
            except ArrowQuantError as error:
                logger.warning("secrets cannot be read from the job database, trying again: %s", error.detail)
                await asyncio.sleep(RETRY_S)

    async def _change(self, statements: Callable[[sqlite3.Connection], None]) -> None:
        while True:
            try:
                return await self._database.change(statements)
            except ArrowQuantError as error:
                logger.warning("a delivery cannot be noted in the job database, trying again: %s", error.detail)
                await asyncio.sleep(RETRY_S)

    async def _seconds_to_next(self, now: datetime) -> float:
        at = await self._database.read(lambda db: delivery_table.next_time(db, now))
        return LOOK_S if at is None else min(LOOK_S, max(0.0, (at - datetime.now(UTC)).total_seconds()))


def _full(names: Iterable[str], limit: int) -> set[str]:
    return {name for name, count in Counter(names).items() if count >= limit}
