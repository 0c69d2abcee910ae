"""Ended jobs with files, put into a data folder without running them."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import uuid_utils

from service.jobs.batch import Batch
from service.jobs.events import Event, Merged
from service.jobs.folders import Folders
from service.jobs.job import Artifact, Job, Status
from service.jobs.store import Store
from service.jobs.tenant import DEFAULT_TENANT
from tests.jobs.models import quantize_request

NOW = datetime(2026, 6, 1, tzinfo=UTC)
SIZE = 1000
OUTPUT = "compressed-tensors"


def ago(seconds: float) -> datetime:
    """So long before NOW."""
    return NOW - timedelta(seconds=seconds)


def keep_job(
    data_dir: Path,
    store: Store,
    *,
    age_s: float,
    tenant: str = DEFAULT_TENANT,
    files: int = 2,
    events: int = 5,
    batch: Batch | None = None,
    **fields: Any,
) -> Job:
    """A job that succeeded so long before NOW, with files of SIZE bytes, a report and a log; a batch's only one."""
    request = quantize_request(Path("/models/a"), **fields)
    at, id_ = ago(age_s), f"job_{uuid_utils.uuid7()}"
    place = None if batch is None else 0
    job = Job(id_, request, {}, Status.QUEUED, at, tenant=tenant, batch_id=batch and batch.id, batch_index=place)
    store.add_all([job], [_event(job, 1, "job.queued", at)], batch)
    folders = Folders(data_dir)
    folders.create()
    folder = folders.artifacts(id_) / OUTPUT
    folder.mkdir(parents=True)
    folders.report(id_).write_text("{}")
    artifacts = []
    for index in range(files):
        content = hashlib.sha256(f"{id_}{index}".encode()).digest() * (SIZE // 32) + bytes(SIZE % 32)
        path = folder / f"{index}.bin"
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        artifacts.append(Artifact(f"{OUTPUT}/{path.name}", SIZE, digest, "application/octet-stream", str(path)))
    done = job.to(Status.RUNNING, started_at=at).to(Status.SUCCEEDED, finished_at=at, artifacts=tuple(artifacts))
    log = [_event(job, index, "tensor.completed", at) for index in range(2, events)]
    store.write([done], [*log, _event(job, events, "job.succeeded", at)])
    return done


def _event(job: Job, id_: int, type_: str, at: datetime) -> Event:
    place = job.batch_id and Merged(job.batch_id, 0, id_, is_last=type_ == "job.succeeded")
    return Event(id_, type_, job.id, at, {"status": "x", "text": "y" * 100}, merged=place or None)
