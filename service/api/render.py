"""Records of jobs and events, as the API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from service.api import problems
from service.api.schemas import batches as wire_batches
from service.api.schemas import common
from service.api.schemas import events as wire_events
from service.api.schemas import jobs as wire
from service.jobs.batch import Batch
from service.jobs.events import PROGRESS, Event
from service.jobs.job import Job
from service.jobs.request import JobRequest
from service.jobs.webhooks.addresses import shown
from service.jobs.webhooks.delivery import Delivery

_EVENT: TypeAdapter[wire_events.Event] = TypeAdapter(wire_events.Event)


def job_path(job_id: str) -> str:
    """The address of a job."""
    return f"/v1/jobs/{job_id}"


def job(record: Job, deliveries: Sequence[Delivery] | None = None) -> wire.Job:
    """A job, with the deliveries of its webhook where they are given."""
    path = job_path(record.id)
    error = record.error
    return wire.Job.model_validate(
        {
            "id": record.id,
            "kind": record.request.kind,
            "status": record.status,
            "created_at": record.created_at,
            "started_at": record.started_at,
            "finished_at": record.finished_at,
            "artifacts_expired_at": record.artifacts_expired_at,
            "events_expired_at": record.events_expired_at,
            "request": _without_secrets(record.request),
            "batch_id": record.batch_id,
            "batch_index": record.batch_index,
            "config": record.config,
            "labels": record.request.labels,
            "progress": asdict(record.progress) if record.progress else None,
            "times": _times(record),
            "result": record.result,
            "error": problems.failure(error.code, error.detail, path, error.tensor, error.pointer) if error else None,
            "webhook": _webhook(record.request, deliveries),
            "links": common.Links(
                self=path,
                events=f"{path}/events",
                report=f"{path}/report",
                artifacts=f"{path}/artifacts",
                archive=f"{path}/archive",
            ),
        }
    )


def _times(record: Job) -> dict[str, float] | None:
    if record.queue_s is None:
        return None
    seconds = {"queue": record.queue_s, **record.times}
    return {f"{part}_s": round(spent, 6) for part, spent in seconds.items()}


def _without_secrets(request: JobRequest) -> JobRequest:
    webhook = request.webhook
    if webhook is None:
        return request
    return request.model_copy(update={"webhook": webhook.model_copy(update={"url": shown(webhook.url)})})


def _webhook(request: JobRequest, deliveries: Sequence[Delivery] | None) -> wire.JobWebhook | None:
    if request.webhook is None or deliveries is None:
        return None
    told = [wire.WebhookDelivery.model_validate(asdict(delivery)) for delivery in deliveries]
    return wire.JobWebhook(url=shown(request.webhook.url), deliveries=told)


def batch_path(batch_id: str) -> str:
    """The address of a batch."""
    return f"/v1/batches/{batch_id}"


def batch(record: Batch, *, with_jobs: bool = True) -> wire_batches.Batch:
    """A batch; in a list without the ids of its jobs."""
    path = batch_path(record.id)
    counts = {status.value: count for status, count in record.counts.items()}
    return wire_batches.Batch(
        id=record.id,
        status=record.status,
        created_at=record.created_at,
        finished_at=record.finished_at,
        labels=record.labels,
        counts=wire_batches.BatchCounts(total=len(record.job_ids), **counts),
        job_ids=list(record.job_ids) if with_jobs else None,
        links=wire_batches.BatchLinks(self=path, events=f"{path}/events", jobs=f"/v1/jobs?batch_id={record.id}"),
    )


def event(record: Event) -> wire_events.Event:
    """An event in the stream of its job; a terminal one with the whole job."""
    return _event(record, {"job_id": record.job_id})


def batch_event(record: Event) -> wire_events.Event:
    """An event in the stream of a batch."""
    if record.merged is None:
        # Said to one reader of the stream, about no job.
        return _event(record, {"batch_id": record.job_id})
    return _event(record, {"job_id": record.job_id, "index": record.merged.index})


def _event(record: Event, subject: dict[str, Any]) -> wire_events.Event:
    shown = job(record.job) if record.job else None
    fields = {"id": record.id, "type": record.type, "at": record.at, "job": shown} | subject
    data = {"progress": record.data} if record.type == PROGRESS else record.data
    return _EVENT.validate_python({k: v for k, v in (data | fields).items() if v is not None})
