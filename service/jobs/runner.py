"""Runs one job in a worker thread, from its sources to its published outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from service.engine.budget import within_budgets
from service.engine.clock import Clock, Part, Times
from service.engine.memory_need import Need, check_need, need_to_quantize, need_to_validate
from service.engine.pipeline import quantize
from service.engine.plan import make_feed, make_plan
from service.engine.progress import Report
from service.engine.report import RunReport
from service.engine.sensitivity import MEASURED, behind_measuring
from service.engine.validation import validate
from service.errors import ArrowQuantError, Cancelled, InternalError, TimedOut
from service.jobs.admission import job_config, output_specs
from service.jobs.backend_pool import BackendPool
from service.jobs.folders import Folders
from service.jobs.job import Artifact, Failure, Job
from service.jobs.memory import release_memory
from service.jobs.memory_ledger import MemoryLedger
from service.jobs.publisher import Publisher
from service.jobs.request import QuantizeRequest
from service.jobs.sources import Sources
from service.jobs.stop import Reason, StopSignal
from service.jobs.watch import log_of
from service.storage.faults import storage_faults

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finished:
    """The job did what it was asked to; everything is published."""

    result: dict[str, Any]
    artifacts: tuple[Artifact, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The job could not be finished; nothing of it is left."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Discarded:
    """The job was cancelled; nothing of it is left."""


@dataclass(frozen=True, slots=True)
class Suspended:
    """The server is going down; the next one goes on from the checkpoint."""


@dataclass(frozen=True, slots=True)
class Parked:
    """The job has made room for others and goes on from the checkpoint; when its need of memory is new, with that."""

    memory_bytes: int | None = None


Outcome = Finished | Failed | Discarded | Suspended | Parked


class _LacksMemory(Exception):
    """What a job needs is more than is free."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes = nbytes


class Runner:
    """Runs jobs. Every method blocks and belongs in a worker thread."""

    def __init__(
        self,
        folders: Folders,
        sources: Sources,
        publisher: Publisher,
        backends: BackendPool,
        block_bytes: int,
        memory: MemoryLedger,
    ) -> None:
        """`memory` is where each job that runs has what was predicted for it, or a guess."""
        self._folders = folders
        self._sources = sources
        self._publisher = publisher
        self._backends = backends
        self._block_bytes = block_bytes
        self._memory = memory

    def run(self, job: Job, stop: StopSignal, report: Report, clock: Clock) -> Outcome:
        """Run a job from its start or its checkpoint until it ends or has to make room; never raises.

        The clock is told what goes on.
        """
        clock.turn("plan")
        after: Part | None = None
        with log_of(job):
            try:
                outcome = _never_raising(job, lambda: self._attempt(job, stop, report, clock))
                if isinstance(outcome, Failed | Discarded):
                    clock.turn("publish")
                    outcome = _never_raising(job, lambda: self._clean_up(job, outcome))
                after = "wait" if isinstance(outcome, Parked) else None
                return outcome
            finally:
                release_memory()
                clock.turn(after)

    def discard(self, job: Job) -> Outcome:
        """Remove all that a job has written; never raises."""
        with log_of(job):
            return _never_raising(job, lambda: self._clean_up(job, Discarded()))

    def _attempt(self, job: Job, stop: StopSignal, report: Report, clock: Clock) -> Outcome:
        try:
            with storage_faults("running the job"):
                return self._work(job, stop, report, clock)
        except Cancelled:
            if stop.reason is Reason.DRAIN:
                return Suspended()
            if stop.reason is Reason.PARK:
                return Parked()
            if stop.reason is Reason.TIMEOUT:
                return Failed(_timed_out(job))
            return Discarded()
        except _LacksMemory as error:
            return Parked(error.nbytes)
        except ArrowQuantError as error:
            return Failed(Failure(error.code, error.detail, error.tensor, error.pointer))

    def _work(self, job: Job, stop: StopSignal, report: Report, clock: Clock) -> Finished:
        result = self._publisher.committed(job.id)
        if result is None:
            result = self._compute(job, stop, report, clock)
            clock.turn("publish")
            self._publisher.commit(job.id, result)
        else:
            clock.turn("publish")
            clock.go_on(Times(result.stages, result.stage_bytes))
        artifacts = self._publisher.publish(job, result, stop.is_set)
        return Finished(result.result(), artifacts)

    def _compute(self, job: Job, stop: StopSignal, report: Report, clock: Clock) -> RunReport:
        config = job_config(job)
        work = self._folders.work(job.id)
        work.mkdir(exist_ok=True)
        backend = self._backends.get(config.backend or "auto")
        clock.backend = backend.id
        tools: dict[str, Any] = {
            "backend": backend,
            "block_bytes": self._block_bytes,
            "report": stop.watching(report),
            "cancelled": stop.is_set,
            "clock": clock,
        }
        inputs = self._folders.inputs(job.id)
        # Readers ask from threads of their own, which must not take up the wish to park.
        with self._sources.opened(job.request, job.tenant, inputs, lambda: stop.reason is not None) as opened:
            if isinstance(job.request, QuantizeRequest):
                plan = make_plan(opened.models[0], output_specs(job.request, config), opened.calibration)
                self._claim(job, need_to_quantize(plan, self._block_bytes))
                plan = within_budgets(
                    plan,
                    opened.models[0],
                    backend=backend,
                    memo=work / MEASURED,
                    report=tools["report"],
                    cancelled=stop.is_set,
                )
                if plan.budgets:
                    tools["report"] = behind_measuring(tools["report"])
                return quantize(plan, opened.models[0], work, **tools)
            original, quantized = opened.models
            feed = make_feed([config], opened.calibration) if opened.calibration is not None else None
            self._claim(job, need_to_validate(original, quantized, self._block_bytes, feed))
            floor = config.min_accuracy or 0.0
            return validate(original, quantized, work=work, min_accuracy=floor, feed=feed, **tools)

    def _claim(self, job: Job, need: Need) -> None:
        """Have the job hold what its headers say that it needs, whatever was known when it was queued."""
        check_need(need, self._memory.limit_bytes)
        if not self._memory.give(job.id, need.nbytes):
            raise _LacksMemory(need.nbytes)

    def _clean_up(self, job: Job, outcome: Outcome) -> Outcome:
        try:
            self._publisher.discard(job)
        except (OSError, ArrowQuantError) as error:
            logger.warning("job %s: something could not be removed, the next start tries again: %s", job.id, error)
        return outcome


def _never_raising(job: Job, work: Callable[[], Outcome]) -> Outcome:
    try:
        return work()
    except Exception:  # noqa: BLE001 - the one place where a crash becomes a failed job
        return Failed(_crashed(job))


def _timed_out(job: Job) -> Failure:
    return Failure(TimedOut.code, f"the job ran longer than its timeout_s of {job.request.timeout_s} seconds")


def _crashed(job: Job) -> Failure:
    incident = uuid4().hex[:12]
    logger.exception("job %s failed unexpectedly, incident %s", job.id, incident)
    return Failure(InternalError.code, f"the service has a fault; the server's log tells more under {incident}")
