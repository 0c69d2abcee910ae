"""What is counted of jobs, as Prometheus reads it; names and units follow its conventions."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.engine.clock import Clock
from service.jobs.figures import Figures
from service.jobs.job import Job, Status

#: Tenants shown by name, those with the most first; all others together are one.
TENANTS_SHOWN = 100
#: No tenant can have this name.
OTHERS = "(others)"

# When each series began is of no use here, and would double their number.
disable_created_metrics()  # type: ignore[no-untyped-call]

_LONG_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400)
_WAITS_S = (0.005, 0.025, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class JobMetrics:
    """Counters and histograms of one process, on a registry of its own; changed on the event loop."""

    def __init__(self) -> None:
        #: What all metrics are read from; others may add theirs.
        self.registry = registry = CollectorRegistry()
        self._created = Counter("arrowquant_jobs_created", "Jobs that were accepted.", ["kind"], registry=registry)
        self._finished = Counter(
            "arrowquant_jobs_finished", "Jobs that have ended.", ["kind", "status"], registry=registry
        )
        self._queue = Histogram(
            "arrowquant_job_queue_seconds", "From accepted to started.", buckets=_WAITS_S, registry=registry
        )
        self._run = Histogram(
            "arrowquant_job_seconds", "From started to ended.", ["kind"], buckets=_LONG_S, registry=registry
        )
        self._cancel = Histogram(
            "arrowquant_cancel_seconds", "From DELETE to cancelled, files gone.", buckets=_SHORT_S, registry=registry
        )
        #: From when something happened until it was written to a stream that was open then.
        self.event_lag = Histogram(
            "arrowquant_event_lag_seconds",
            "From an event to its being written to an open stream.",
            buckets=_SHORT_S,
            registry=registry,
        )
        self.readers_cut = Counter(
            "arrowquant_event_readers_cut", "Streams cut off because their readers were too slow.", registry=registry
        )
        self._cancelled_at: dict[str, float] = {}
        self._ended_seconds: Tally[tuple[str, str]] = Tally()
        self._ended_bytes: Tally[tuple[str, str]] = Tally()

    def created(self, job: Job) -> None:
        """A job was accepted."""
        self._created.labels(job.request.kind).inc()

    def moved(self, job: Job) -> None:
        """A job has got another state, which is not stored yet."""
        if job.status is Status.RUNNING and job.queue_s is not None:
            self._queue.observe(job.queue_s)
        elif job.status in (Status.CANCELLING, Status.CANCELLED):
            self._cancelled_at.setdefault(job.id, time.monotonic())

    def ended(self, job: Job, clock: Clock) -> None:
        """The last state of a job is stored."""
        self._finished.labels(job.request.kind, job.status).inc()
        if job.started_at is not None and job.finished_at is not None:
            self._run.labels(job.request.kind).observe((job.finished_at - job.started_at).total_seconds())
        asked_at = self._cancelled_at.pop(job.id, None)
        if asked_at is not None and job.status is Status.CANCELLED:
            self._cancel.observe(time.monotonic() - asked_at)
        _add(self._ended_seconds, self._ended_bytes, clock)

    def stages(self, running: list[Clock]) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], int]]:
        """Seconds and bytes by stage and backend, of all jobs that this process has run or runs."""
        seconds, nbytes = Tally(self._ended_seconds), Tally(self._ended_bytes)
        for clock in running:
            _add(seconds, nbytes, clock)
        return dict(seconds), dict(nbytes)


class FiguresCollector(Collector):
    """Shows the figures that were gathered last."""

    def __init__(self, *, by_tenant: bool) -> None:
        self.figures: Figures | None = None
        self._by_tenant = by_tenant

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        figures = self.figures
        if figures is None:
            return
        yield from self._jobs(figures)
        yield from self._stages(figures)
        yield from self._stored(figures)
        if self._by_tenant:
            yield from self._tenants(figures)

    def _jobs(self, figures: Figures) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("arrowquant_jobs", "Jobs by status, those in the store included.", labels=["status"])
        open_ = Tally[str]()
        for (_, status), number in figures.open_jobs.items():
            open_[status] += number
        for status in Status:
            if not status.is_terminal:
                jobs.add_metric([status], open_[status])
            elif figures.stored is not None:
                jobs.add_metric([status], figures.stored.ended.get(status, 0))
        yield jobs
        yield _gauge("arrowquant_job_queue_depth", "Jobs that wait for a lane.", figures.queue_depth)
        yield _gauge("arrowquant_lanes_busy", "Jobs that hold a lane.", figures.running)
        yield _gauge("arrowquant_event_streams", "Streams of events that are open.", figures.readers)

    def _stages(self, figures: Figures) -> Iterator[Metric]:
        labels = ["stage", "backend"]
        seconds = CounterMetricFamily(
            "arrowquant_stage_seconds", "Time of jobs by part of the work; the parts add up.", labels=labels
        )
        nbytes = CounterMetricFamily("arrowquant_stage_bytes", "Bytes that went through a part.", labels=labels)
        for family, values in ((seconds, figures.stage_seconds), (nbytes, figures.stage_bytes)):
            for key, value in sorted(values.items()):
                family.add_metric(key, value)
            yield family

    def _stored(self, figures: Figures) -> Iterator[Metric]:
        if (stored := figures.stored) is not None:
            family = GaugeMetricFamily("arrowquant_stored_bytes", "Bytes of the data folder's files.", labels=["kind"])
            family.add_metric(["artifacts"], stored.artifact_bytes)
            family.add_metric(["blobs"], stored.blob_bytes)
            yield family
            yield _gauge("arrowquant_blobs", "Uploaded files.", stored.blobs)
            text = "Messages to receivers that have not arrived and are not given up."
            yield _gauge("arrowquant_webhook_deliveries_pending", text, stored.webhooks_pending)
        if figures.disk is not None:
            yield _gauge("arrowquant_disk_free_bytes", "Free for the data folder.", figures.disk.free)
            yield _gauge("arrowquant_disk_used_bytes", "Used on the data folder's disk.", figures.disk.used)

    def _tenants(self, figures: Figures) -> Iterator[Metric]:
        open_: Tally[str] = Tally()
        for (tenant, _), number in figures.open_jobs.items():
            open_[tenant] += number
        by_tenant = (
            ("arrowquant_tenant_open_jobs", "Jobs of a tenant that have not ended.", open_),
            (
                "arrowquant_tenant_stored_bytes",
                "Bytes that count as a tenant's.",
                Tally(figures.stored.tenants if figures.stored else {}),
            ),
        )
        for name, text, values in by_tenant:
            family = GaugeMetricFamily(name, text, labels=["tenant"])
            ranked = values.most_common()
            for tenant, value in ranked[:TENANTS_SHOWN]:
                family.add_metric([tenant], value)
            if rest := ranked[TENANTS_SHOWN:]:
                family.add_metric([OTHERS], sum(value for _, value in rest))
            yield family


def _add(seconds: Tally[tuple[str, str]], nbytes: Tally[tuple[str, str]], clock: Clock) -> None:
    here = clock.here
    for part, spent in here.seconds.items():
        seconds[part, clock.backend] += spent  # type: ignore[assignment]  # a Counter adds any numbers
    for part, count in here.nbytes.items():
        nbytes[part, clock.backend] += count


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
