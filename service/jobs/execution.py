"""Jobs that have not ended, from the queue through their turns in a lane to their end; everything on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any

from service.engine.progress import Happening
from service.errors import PendingTimedOut
from service.jobs.job import Failure, Status
from service.jobs.live import LiveJob
from service.jobs.mailbox import Mailbox
from service.jobs.memory_ledger import MemoryLedger
from service.jobs.runner import Discarded, Failed, Finished, Outcome, Parked, Runner, Suspended
from service.jobs.scheduler import Scheduler
from service.jobs.stop import Reason, StopSignal
from service.jobs.threads import run_in_thread
from service.jobs.waiting import Claim

#: How often it is looked whether somebody has to make room.
LOOK_S = 0.1
#: Row blocks that a job is taken to need as long as nobody has read its headers.
UNKNOWN_BLOCKS = 4


class Execution:
    """Carries out what the scheduler decides."""

    def __init__(
        self,
        runner: Runner,
        live: Mapping[str, LiveJob],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        complete_log: Callable[[LiveJob], Awaitable[None]],
        lanes: Mapping[str, int],
        lanes_left: Callable[[], Mapping[str, int]],
        memory: MemoryLedger,
        unknown_bytes: int,
    ) -> None:
        """`live` are the jobs that have not ended; `spawn` has a coroutine run that a drain waits for.

        `complete_log` is awaited before the success of a job that an earlier server began. `lanes_left` are those of
        devices of which a part has failed. Jobs of which it is not
        known what they need of memory begin with `unknown_bytes`, and tell when they have read the headers.
        """
        self._runner = runner
        self._live = live
        self._spawn = spawn
        self._complete_log = complete_log
        self._lanes_left = lanes_left
        self._unknown_bytes = unknown_bytes
        self._scheduler = Scheduler(lanes, memory, self._start, self._park)
        self._pending: dict[str, asyncio.TimerHandle] = {}
        self._look: asyncio.TimerHandle | None = None

    @property
    def depth(self) -> int:
        """How many jobs wait, those among them that have had a turn."""
        return self._scheduler.depth

    @property
    def running(self) -> int:
        """How many jobs are in a lane."""
        return self._scheduler.running

    def depth_of(self, tenant: str) -> int:
        """How many jobs of a tenant wait."""
        return self._scheduler.depth_of(tenant)

    def ahead_of(self, tenant: str, priority: int, device: str) -> int:
        """See `Scheduler.ahead_of`."""
        return self._scheduler.ahead_of(tenant, priority, device)

    def enqueue(self, live: LiveJob, device: str, memory_bytes: int | None, service_s: float = 0.0) -> None:
        """Have a job wait for its turn, and for memory; `service_s` is what it has had from an earlier server."""
        request = live.job.request
        if live.status is Status.QUEUED and request.max_pending_s is not None:
            waited = (datetime.now(UTC) - live.job.created_at).total_seconds()
            if waited >= request.max_pending_s:
                self._give_up(live)
                return
            timer = asyncio.get_running_loop().call_later(request.max_pending_s - waited, self._give_up, live)
            self._pending[live.job.id] = timer
        self._scheduler.put(
            live.job.id, live.tenant, request.priority, device, memory_bytes or self._unknown_bytes, service_s
        )
        self._keep_looking()

    def cancel(self, live: LiveJob) -> None:
        """End a job: at once when it waits for its first turn, or else when its files are gone."""
        job_id = live.job.id
        if live.status is Status.QUEUED:
            self._scheduler.remove(job_id)
            self._drop_timer(job_id)
            live.to(Status.CANCELLED)
        elif live.status is Status.RUNNING:
            live.to(Status.CANCELLING)
            if self._scheduler.remove(job_id):
                self.clear_away(live)
            else:
                live.stop.ask(Reason.CANCEL)

    def clear_away(self, live: LiveJob) -> None:
        """Go on with the end of a job that an earlier server had begun to cancel."""
        self._spawn(self._discard(live))

    def open(self) -> None:
        """Give those that wait their turns from now on."""
        self._scheduler.open()
        self._keep_looking()

    def close(self) -> None:
        """Start nothing more, and have those in a lane leave it."""
        self._scheduler.close()
        for timer in [*self._pending.values(), *([self._look] if self._look else [])]:
            timer.cancel()
        for live in self._live.values():
            live.stop.ask(Reason.DRAIN)

    # --- called by the scheduler ---

    def _start(self, claim: Claim) -> None:
        live = self._live[claim.job_id]
        # Of its own for each turn: it is asked to end one, not the next.
        live.stop = StopSignal()
        if live.job.request.timeout_s is not None:
            live.stop.set_deadline(live.job.request.timeout_s - claim.service_s)
        if live.status is Status.QUEUED:
            self._drop_timer(claim.job_id)
            live.to(Status.RUNNING)
        elif live.is_left_over and not live.is_resumed:
            live.resume()
        self._spawn(self._run(live))

    def _park(self, job_id: str) -> None:
        self._live[job_id].stop.ask_to_park()

    # --- inside ---

    async def _run(self, live: LiveJob) -> None:
        job, stop = live.job, live.stop

        def hear(happening: Happening) -> None:
            self._scheduler.at_work(job.id)
            live.happened(happening)

        mailbox = Mailbox(hear)
        outcome = await run_in_thread(lambda: self._runner.run(job, stop, mailbox.put, live.clock), name=job.id)
        await mailbox.flush()
        if live.is_resumed and isinstance(outcome, Finished):
            await self._complete_log(live)
        if live.status is Status.CANCELLING and not isinstance(outcome, Discarded):
            # The cancel came when there was nothing left to stop.
            outcome = await run_in_thread(lambda: self._runner.discard(job), name=job.id)
        _conclude(live, outcome)
        is_parked = isinstance(outcome, Parked)
        self._scheduler.keep(self._lanes_left())
        self._scheduler.left(
            job.id, waits_again=is_parked, memory_bytes=outcome.memory_bytes if isinstance(outcome, Parked) else None
        )
        self._keep_looking()

    async def _discard(self, live: LiveJob) -> None:
        job = live.job
        _conclude(live, await run_in_thread(lambda: self._runner.discard(job), name=job.id))

    def _give_up(self, live: LiveJob) -> None:
        """Fail a job whose first turn has not come in time."""
        job = live.job
        self._pending.pop(job.id, None)
        self._scheduler.remove(job.id)
        detail = f"no turn came within the job's max_pending_s of {job.request.max_pending_s} seconds"
        live.to(Status.FAILED, error=Failure(PendingTimedOut.code, detail))

    def _drop_timer(self, job_id: str) -> None:
        timer = self._pending.pop(job_id, None)
        if timer is not None:
            timer.cancel()

    def _keep_looking(self) -> None:
        """While jobs wait: turns end, and nothing else would tell."""
        if self._look is None and self._scheduler.depth and self._scheduler.is_open:
            self._look = asyncio.get_running_loop().call_later(LOOK_S, self._look_again)

    def _look_again(self) -> None:
        self._look = None
        self._scheduler.look()
        self._keep_looking()


def _conclude(live: LiveJob, outcome: Outcome) -> None:
    match outcome:
        case Finished(result, artifacts):
            live.to(Status.SUCCEEDED, result=result, artifacts=artifacts)
        case Failed(failure):
            live.to(Status.FAILED, error=failure)
        case Discarded():
            live.to(Status.CANCELLED)
        case Suspended() | Parked():
            pass
