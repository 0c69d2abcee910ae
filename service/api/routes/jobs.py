"""Jobs: create, list, look at, cancel, purge."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import AwareDatetime, BeforeValidator

from service import errors
from service.api import render
from service.api.auth import Caller
from service.api.dependencies import (
    AfterJob,
    JobId,
    KnownParameters,
    LabelFilter,
    Limit,
    Manager,
    State,
    Wait,
    applied,
    takes_json,
)
from service.api.http_errors import BodyTooLarge, BodyTooSlow, InvalidRequest, MalformedBody, UnsupportedMediaType
from service.api.idempotency import IdempotencyKey, answer_once, key_of
from service.api.problems import documented
from service.api.replies import NOT_MODIFIED, dump, reply, tagged_reply
from service.api.schemas.jobs import Job, JobKind, JobPage
from service.jobs.job import Job as JobRecord
from service.jobs.job import Status
from service.jobs.request import JobRequest

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[KnownParameters])

CREATION_ERRORS = (
    MalformedBody,
    BodyTooLarge,
    BodyTooSlow,
    UnsupportedMediaType,
    InvalidRequest,
    errors.InvalidConfig,
    errors.UnsupportedByFormat,
    errors.ForbiddenPath,
    errors.ModelNotFound,
    errors.ArtifactsExpired,
    errors.BlobNotFound,
    errors.CorruptModel,
    errors.SourceChanged,
    errors.StoreRefused,
    errors.StoreUnavailable,
    errors.UnsupportedModel,
    errors.PickledWeights,
    errors.AlreadyQuantized,
    errors.TargetInUse,
    errors.WebhookRefused,
    errors.WebhookSecretMissing,
    errors.LookupsBusy,
    errors.ExceedsMemory,
    errors.InvalidCalibration,
)

#: What a call may be refused for that comes with an idempotency key.
REPEATED = (errors.IdempotencyKeyReused, errors.IdempotencyKeyInFlight)

#: What a call that makes jobs may be refused for whatever it asks.
NO_ROOM = (errors.QueueFull, errors.TooManyOpenJobs, errors.StorageQuotaExceeded, errors.Draining, errors.NotReady)


def _rfc3339(value: Any) -> Any:
    # Numbers would be taken for seconds since 1970.
    if isinstance(value, str) and not _TIME.fullmatch(value):
        raise ValueError("is not a time after RFC 3339, such as 2026-01-31T12:00:00Z")
    return value


_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
CreatedAfter = Annotated[
    Annotated[AwareDatetime, BeforeValidator(_rfc3339)] | None, Query(description="With a time zone.")
]

_CANCELLED: dict[int | str, dict[str, Any]] = {
    202: {"description": "The job is being cancelled, or was.", "model": Job},
    204: {"description": "The job is deleted, with all that belongs to it."},
}


@router.post(
    "",
    status_code=202,
    response_model=Job,
    dependencies=[Depends(takes_json)],
    responses=documented(*CREATION_ERRORS, *REPEATED, *NO_ROOM),
)
async def create_job(
    request: Request, body: JobRequest, state: State, caller: Caller, wait: Wait, idempotency_key: IdempotencyKey = None
) -> Response:
    """Create a job. With `Prefer: wait=N` the answer comes when it has ended, or after N seconds."""

    async def waited(job: JobRecord) -> Response:
        return _accepted(await state.wait(request, job.id, wait or 0, caller.tenant), applied(wait))

    return await answer_once(
        state.manager.keys,
        key_of(caller.tenant, idempotency_key, "create_job", body),
        lambda once: state.manager.submit(body, caller.tenant, once),
        _accepted,
        None if wait is None else waited,
    )


@router.get("", response_model=JobPage, responses=documented(InvalidRequest))
async def list_jobs(
    manager: Manager,
    caller: Caller,
    label: LabelFilter,
    status: Status | None = None,
    kind: JobKind | None = None,
    batch_id: Annotated[str | None, Query(max_length=64, description="Only the jobs of this batch.")] = None,
    created_after: CreatedAfter = None,
    limit: Limit = 50,
    after: AfterJob = None,
) -> Response:
    """Jobs, newest first."""
    jobs, cursor = await manager.jobs.find(
        tenant=caller.reach,
        status=status,
        kind=kind,
        batch_id=batch_id,
        label=label,
        created_after=created_after,
        limit=limit,
        after=after,
    )
    return reply(JobPage(data=[render.job(job) for job in jobs], next_cursor=cursor))


@router.get("/{job_id}", response_model=Job, responses=NOT_MODIFIED | documented(errors.NotFound, InvalidRequest))
async def get_job(request: Request, job_id: JobId, state: State, caller: Caller, wait: Wait) -> Response:
    """A job. With `Prefer: wait=N` the answer comes when it has ended, or after N seconds."""
    tenant = caller.reach
    job = await (state.manager.jobs.get(job_id, tenant) if wait is None else state.wait(request, job_id, wait, tenant))
    deliveries = await state.manager.webhooks.deliveries(job_id) if job.request.webhook else None
    return tagged_reply(request, dump(render.job(job, deliveries)), headers=applied(wait))


@router.delete(
    "/{job_id}",
    response_model=Job,
    responses=_CANCELLED | documented(errors.NotFound, errors.NotTerminal, errors.JobInUse, InvalidRequest),
)
async def cancel_job(
    job_id: JobId,
    manager: Manager,
    caller: Caller,
    purge: Annotated[
        bool,
        Query(
            description="Delete a job that has ended: record, events, report and artifacts. "
            "A download that is under way goes on; a job that waits or runs with this one as its source is 409 "
            "`job_in_use`. "
            "Outputs written to a `uri` of their own stay."
        ),
    ] = False,
) -> Response:
    """Cancel a job; one that has ended is answered as it is, so that a repeated call does no harm."""
    if purge:
        await manager.purge(job_id, caller.reach)
        return Response(status_code=204)
    before = await manager.jobs.get(job_id, caller.reach)
    job = await manager.cancel(job_id, caller.reach)
    ended = before.status.is_terminal or job.status in (Status.SUCCEEDED, Status.FAILED)
    return reply(render.job(job), 200 if ended else 202)


def _accepted(job: JobRecord, headers: dict[str, str] | None = None) -> Response:
    return reply(render.job(job), 202, {"Location": render.job_path(job.id), **(headers or {})})
