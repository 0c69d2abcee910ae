"""A job as JSON, as the store keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter

from service.engine.progress import Progress
from service.jobs.job import Artifact, Failure, Job, Status
from service.jobs.request import JobRequest
from service.jobs.tenant import DEFAULT_TENANT
from service.jobs.times import time_of

_REQUEST: TypeAdapter[JobRequest] = TypeAdapter(JobRequest)


def to_record(job: Job) -> str:
    """The job as JSON. The request as it was sent: a field that was not set stays unset."""
    fields: dict[str, Any] = {
        "id": job.id,
        "tenant": job.tenant,
        "request": job.request.model_dump(mode="json", exclude_unset=True),
        "config": job.config,
        "status": job.status,
        "created_at": job.created_at.isoformat(),
        "started_at": job.started_at and job.started_at.isoformat(),
        "finished_at": job.finished_at and job.finished_at.isoformat(),
        "progress": job.progress and asdict(job.progress),
        "result": job.result,
        "error": job.error and asdict(job.error),
        "artifacts": [asdict(artifact) for artifact in job.artifacts],
        "batch_id": job.batch_id,
        "batch_index": job.batch_index,
        "times": job.times or None,
        "request_id": job.request_id,
        "traceparent": job.traceparent,
        "artifacts_expired_at": job.artifacts_expired_at and job.artifacts_expired_at.isoformat(),
        "events_expired_at": job.events_expired_at and job.events_expired_at.isoformat(),
    }
    return json.dumps({name: value for name, value in fields.items() if value is not None}, separators=(",", ":"))


def from_record(record: str) -> Job:
    """The inverse of `to_record`."""
    fields = json.loads(record)
    return Job(
        id=fields["id"],
        request=_REQUEST.validate_python(fields["request"]),
        config=fields["config"],
        status=Status(fields["status"]),
        created_at=datetime.fromisoformat(fields["created_at"]),
        started_at=time_of(fields.get("started_at")),
        finished_at=time_of(fields.get("finished_at")),
        progress=Progress(**fields["progress"]) if "progress" in fields else None,
        result=fields.get("result"),
        error=Failure(**fields["error"]) if "error" in fields else None,
        artifacts=tuple(Artifact(**artifact) for artifact in fields["artifacts"]),
        batch_id=fields.get("batch_id"),
        batch_index=fields.get("batch_index"),
        tenant=fields.get("tenant", DEFAULT_TENANT),
        times=fields.get("times", {}),
        request_id=fields.get("request_id"),
        traceparent=fields.get("traceparent"),
        artifacts_expired_at=time_of(fields.get("artifacts_expired_at")),
        events_expired_at=time_of(fields.get("events_expired_at")),
    )


def with_time(record: str, name: str, time: datetime) -> str:
    """The record with a time set, where it has none: cheaper than to make a job of it."""
    fields = json.loads(record)
    fields.setdefault(name, time.isoformat())
    return json.dumps(fields, separators=(",", ":"))
