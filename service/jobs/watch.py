"""Sees all that becomes of jobs, and counts, logs and traces it; nothing else in here does."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from service.engine.clock import Clock
from service.engine.progress import TensorCompleted
from service.jobs.job import Job
from service.jobs.metrics import JobMetrics
from service.logs import Bound

if TYPE_CHECKING:
    from service.jobs.traces import JobTraces

logger = logging.getLogger(__name__)


class Watch:
    """Told by those who change jobs; everything on the event loop, and nothing waits."""

    def __init__(self, traces: JobTraces | None = None) -> None:
        """Without `traces` nothing is traced."""
        self.metrics = JobMetrics()
        self._traces = traces

    def created(self, job: Job) -> None:
        """A job was accepted."""
        self.metrics.created(job)
        if self._traces is not None:
            self._traces.moved(job)
        with log_of(job):
            logger.info("accepted, to %s", job.request.kind)

    def moved(self, job: Job) -> None:
        """A job has got another state, which is not stored yet."""
        self.metrics.moved(job)
        if self._traces is not None:
            self._traces.moved(job)
        if not job.status.is_terminal:
            with log_of(job):
                logger.info("%s", job.status)

    def tensor(self, job: Job, done: TensorCompleted) -> None:
        """A tensor of a job is finished in one output."""
        if self._traces is not None:
            self._traces.tensor(job, done)

    def ended(self, job: Job, clock: Clock) -> None:
        """The last state of a job is stored."""
        self.metrics.ended(job, clock)
        if self._traces is not None:
            self._traces.ended(job)
        with log_of(job):
            if job.error is not None:
                logger.info("failed, %s: %s", job.error.code, job.error.detail)
            else:
                logger.info("%s after %.3f s", job.status, _lifetime(job))


def log_of(job: Job) -> Bound:
    """For `with`: what is logged in it names the job, its tenant, and the call that made it."""
    return Bound(job_id=job.id, tenant=job.tenant, request_id=job.request_id, traceparent=job.traceparent)


def _lifetime(job: Job) -> float:
    return (job.finished_at - job.created_at).total_seconds() if job.finished_at is not None else 0.0
