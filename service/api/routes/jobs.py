"""Jobs: create, list, look at, cancel, purge."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import AwareDatetime

from service import errors
from service.api import render
from service.api.dependencies import (
    AfterJob,
    JobId,
    KnownParameters,
    LabelFilter,
    Limit,
    Manager,
    State,
    Wait,
    takes_json,
)
from service.api.http_errors import BodyTooLarge, InvalidRequest, MalformedBody, UnsupportedMediaType
from service.api.problems import documented
from service.api.replies import NOT_MODIFIED, dump, reply, tagged_reply
from service.api.schemas.jobs import Job, JobKind, JobPage
from service.jobs.job import Status
from service.jobs.request import JobRequest

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[KnownParameters])

CREATION_ERRORS = (
    MalformedBody,
    BodyTooLarge,
    UnsupportedMediaType,
    InvalidRequest,
    errors.InvalidConfig,
    errors.UnsupportedByFormat,
    errors.ForbiddenPath,
    errors.ModelNotFound,
    errors.UnsupportedModel,
    errors.PickledWeights,
    errors.AlreadyQuantized,
    errors.TargetInUse,
)

_CANCELLED: dict[int | str, dict[str, Any]] = {
    202: {"description": "The job is being cancelled, or was.", "model": Job},
    204: {"description": "The job is deleted, with all that belongs to it."},
}


@router.post(
    "",
    status_code=202,
    response_model=Job,
    dependencies=[Depends(takes_json)],
    responses=documented(*CREATION_ERRORS, errors.QueueFull, errors.Draining),
)
async def create_job(body: JobRequest, state: State, wait: Wait) -> Response:
    """Create a job. With `Prefer: wait=N` the answer comes when it has ended, or after N seconds."""
    job = await state.manager.submit(body)
    headers = {"Location": render.job_path(job.id)}
    if wait is not None:
        job = await state.wait(job.id, wait)
        headers |= _applied(wait)
    return reply(render.job(job), 202, headers)


@router.get("", response_model=JobPage, responses=documented(InvalidRequest))
async def list_jobs(
    manager: Manager,
    label: LabelFilter,
    status: Status | None = None,
    kind: JobKind | None = None,
    created_after: Annotated[AwareDatetime | None, Query(description="With a time zone.")] = None,
    limit: Limit = 50,
    after: AfterJob = None,
) -> Response:
    """Jobs, newest first."""
    jobs, cursor = await manager.find(
        status=status, kind=kind, label=label, created_after=created_after, limit=limit, after=after
    )
    return reply(JobPage(data=[render.job(job) for job in jobs], next_cursor=cursor))


@router.get("/{job_id}", response_model=Job, responses=NOT_MODIFIED | documented(errors.NotFound))
async def get_job(request: Request, job_id: JobId, state: State, wait: Wait) -> Response:
    """A job. With `Prefer: wait=N` the answer comes when it has ended, or after N seconds."""
    job = await (state.manager.get(job_id) if wait is None else state.wait(job_id, wait))
    headers = {} if wait is None else _applied(wait)
    return tagged_reply(request, dump(render.job(job)), headers=headers)


@router.delete(
    "/{job_id}",
    response_model=Job,
    responses=_CANCELLED | documented(errors.NotFound, errors.NotTerminal),
)
async def cancel_job(
    job_id: JobId,
    manager: Manager,
    purge: Annotated[
        bool,
        Query(
            description="Delete a job that has ended: record, events, report and artifacts. "
            "Outputs written to a `uri` of their own stay."
        ),
    ] = False,
) -> Response:
    """Cancel a job; one that has ended is answered as it is, so that a repeated call does no harm."""
    if purge:
        await manager.purge(job_id)
        return Response(status_code=204)
    before = await manager.get(job_id)
    job = await manager.cancel(job_id)
    ended = before.status.is_terminal or job.status in (Status.SUCCEEDED, Status.FAILED)
    return reply(render.job(job), 200 if ended else 202)


def _applied(wait: float) -> dict[str, str]:
    return {"Preference-Applied": f"wait={wait:g}"}
