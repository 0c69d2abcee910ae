"""What becomes of jobs, as OpenTelemetry spans: the job, its wait in the queue, its tensors, its publishing.

Imported only where traces are exported. A job's span is a child of the call that made it, also in a server that goes
on with the job after a restart: the record keeps the call's trace. The spans of one process that was killed before the
job's end have a parent that nobody ever sees.
"""

from __future__ import annotations

import time
from datetime import datetime

from opentelemetry.context import Context
from opentelemetry.trace import Span, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.engine.progress import TensorCompleted
from service.jobs.job import Job, Status

#: Tensors of a job that have spans of their own: the first, and then only slow ones. A model can have 100,000.
FIRST_TENSORS = 100
SLOW_TENSORS = 100
SLOW_S = 1.0


class _Traced:
    """A job that has not ended."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.context: Context = set_span_in_context(span)
        self.first_left = FIRST_TENSORS
        self.slow_left = SLOW_TENSORS
        self.left_out = 0

    def takes(self, seconds: float) -> bool:
        """Whether a tensor gets a span; counts it."""
        if self.first_left > 0:
            self.first_left -= 1
            return True
        if seconds >= SLOW_S and self.slow_left > 0:
            self.slow_left -= 1
            return True
        self.left_out += 1
        return False


class JobTraces:
    """The spans of jobs; everything on the event loop. Nothing waits: spans are exported by a thread."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._traced: dict[str, _Traced] = {}

    def moved(self, job: Job) -> None:
        """A job is new, or has got another state."""
        traced = self._of(job)
        if job.status is Status.RUNNING and job.started_at is not None:
            begun, ended = _ns(job.created_at), _ns(job.started_at)
            self._tracer.start_span("queue", traced.context, start_time=begun).end(ended)

    def tensor(self, job: Job, done: TensorCompleted) -> None:
        """A tensor is finished in one output."""
        traced = self._of(job)
        if not traced.takes(done.seconds):
            return
        now = time.time_ns()
        attributes: dict[str, str | int] = {
            "arrowquant.tensor": done.name,
            "arrowquant.output": done.output,
            "arrowquant.scheme": done.scheme,
            "arrowquant.bytes_in": done.bytes_in,
            "arrowquant.bytes_out": done.bytes_out,
        }
        span = self._tracer.start_span(
            "tensor", traced.context, attributes=attributes, start_time=now - int(done.seconds * 1e9)
        )
        span.end(now)

    def ended(self, job: Job) -> None:
        """The last state of a job is stored."""
        traced = self._of(job)
        del self._traced[job.id]
        end = _ns(job.finished_at) if job.finished_at is not None else time.time_ns()
        if (spent := job.times.get("publish")) is not None:
            self._tracer.start_span("publish", traced.context, start_time=end - int(spent * 1e9)).end(end)
        span = traced.span
        span.set_attribute("arrowquant.status", job.status.value)
        span.set_attribute("arrowquant.tensors_without_span", traced.left_out)
        for part, seconds in job.times.items():
            span.set_attribute(f"arrowquant.{part}_s", round(seconds, 6))
        if job.error is not None:
            span.set_attribute("error.type", job.error.code)
            span.set_status(StatusCode.ERROR, job.error.detail)
        span.end(end)

    def _of(self, job: Job) -> _Traced:
        traced = self._traced.get(job.id)
        if traced is None:
            carrier = {"traceparent": job.traceparent} if job.traceparent else {}
            span = self._tracer.start_span(
                f"job {job.request.kind}",
                TraceContextTextMapPropagator().extract(carrier, Context()),
                attributes={"arrowquant.job_id": job.id, "arrowquant.tenant": job.tenant},
                start_time=_ns(job.created_at),
            )
            traced = self._traced[job.id] = _Traced(span)
        return traced


def _ns(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000) * 1000
