"""Records of jobs and events, as the API shows them."""

from __future__ import annotations

from dataclasses import asdict

from pydantic import TypeAdapter

from service.api import problems
from service.api.schemas import common
from service.api.schemas import events as wire_events
from service.api.schemas import jobs as wire
from service.jobs.events import PROGRESS, Event
from service.jobs.job import Job

_EVENT: TypeAdapter[wire_events.Event] = TypeAdapter(wire_events.Event)


def job_path(job_id: str) -> str:
    """The address of a job."""
    return f"/v1/jobs/{job_id}"


def job(record: Job) -> wire.Job:
    """A job."""
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
            "request": record.request,
            "config": record.config,
            "labels": record.request.labels,
            "progress": asdict(record.progress) if record.progress else None,
            "result": record.result,
            "error": problems.failure(error.code, error.detail, path, error.tensor, error.pointer) if error else None,
            "links": common.Links(
                self=path,
                events=f"{path}/events",
                report=f"{path}/report",
                artifacts=f"{path}/artifacts",
                archive=f"{path}/archive",
            ),
        }
    )


def event(record: Event) -> wire_events.Event:
    """An event; a terminal one with the whole job."""
    shown = job(record.job) if record.job else None
    fields = {"id": record.id, "type": record.type, "job_id": record.job_id, "at": record.at, "job": shown}
    data = {"progress": record.data} if record.type == PROGRESS else record.data
    return _EVENT.validate_python({k: v for k, v in (data | fields).items() if v is not None})
