"""Runs one job in a worker thread, from its sources to its published outputs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from service.engine.clock import Clock, Times
from service.engine.pipeline import quantize
from service.engine.plan import make_plan
from service.engine.progress import Report
from service.engine.report import RunReport
from service.engine.validation import validate
from service.errors import ArrowQuantError, Cancelled, InternalError, TimedOut
from service.jobs.admission import job_config, output_specs
from service.jobs.backend_pool import BackendPool
from service.jobs.folders import Folders
from service.jobs.job import Artifact, Failure, Job
from service.jobs.memory import release_memory
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


Outcome = Finished | Failed | Discarded | Suspended


class Runner:
    """Runs jobs. Every method blocks and belongs in a worker thread."""

    def __init__(
        self, folders: Folders, sources: Sources, publisher: Publisher, backends: BackendPool, block_bytes: int
    ) -> None:
        self._folders = folders
        self._sources = sources
        self._publisher = publisher
        self._backends = backends
        self._block_bytes = block_bytes

    def run(self, job: Job, stop: StopSignal, report: Report, clock: Clock) -> Outcome:
        """Run a job from its start or its checkpoint to its end, and tell the clock what goes on; never raises."""
        clock.turn("plan")
        with log_of(job):
            try:
                return self._attempt(job, stop, report, clock)
            finally:
                release_memory()
                clock.turn(None)

    def discard(self, job: Job) -> Discarded:
        """Remove all that a job has written; never raises."""
        with log_of(job):
            self._clean_up(job)
        return Discarded()

    def _attempt(self, job: Job, stop: StopSignal, report: Report, clock: Clock) -> Outcome:
        failure: Failure | None = None
        try:
            with storage_faults("running the job"):
                return self._work(job, stop, report, clock)
        except Cancelled:
            if stop.reason is Reason.DRAIN:
                return Suspended()
            if stop.reason is Reason.TIMEOUT:
                failure = _timed_out(job)
        except ArrowQuantError as error:
            failure = Failure(error.code, error.detail, error.tensor, error.pointer)
        except Exception:  # noqa: BLE001 - the one place where a crash becomes a failed job
            failure = _crashed(job)
        clock.turn("publish")
        self._clean_up(job)
        return Failed(failure) if failure else Discarded()

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
            "report": report,
            "cancelled": stop.is_set,
            "clock": clock,
        }
        inputs = self._folders.inputs(job.id)
        with self._sources.opened(job.request, job.tenant, inputs) as readers:
            if isinstance(job.request, QuantizeRequest):
                plan = make_plan(readers[0], output_specs(job.request, config))
                return quantize(plan, readers[0], work, **tools)
            return validate(readers[0], readers[1], min_accuracy=config.min_accuracy or 0.0, **tools)

    def _clean_up(self, job: Job) -> None:
        try:
            self._publisher.discard(job)
        except OSError as error:
            logger.warning("job %s: something could not be removed, the next start tries again: %s", job.id, error)


def _timed_out(job: Job) -> Failure:
    return Failure(TimedOut.code, f"the job ran longer than its timeout_s of {job.request.timeout_s} seconds")


def _crashed(job: Job) -> Failure:
    incident = uuid4().hex[:12]
    logger.exception("job %s failed unexpectedly, incident %s", job.id, incident)
    return Failure(InternalError.code, f"the service has a fault; the server's log tells more under {incident}")
