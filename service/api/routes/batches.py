"""Batches: several jobs in one call, followed, cancelled and purged together."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from service import errors
from service.api import render
from service.api.auth import Caller
from service.api.dependencies import (
    AfterBatch,
    BatchId,
    HeldBatch,
    KnownParameters,
    Limit,
    Manager,
    State,
    Wait,
    applied,
    takes_json,
)
from service.api.event_replies import DOCUMENTED, EVENT_STREAM, EventId, LastEventId, event_page, event_stream
from service.api.http_errors import InvalidRequest, NotAcceptable
from service.api.idempotency import IdempotencyKey, answer_once, key_of
from service.api.negotiation import choose
from service.api.problems import documented
from service.api.replies import JSON, NOT_MODIFIED, dump, reply, tagged_reply
from service.api.routes.jobs import CREATION_ERRORS, NO_ROOM, REPEATED
from service.api.schemas.batches import Batch, BatchPage
from service.api.schemas.events import EventPage
from service.jobs.batch import Batch as BatchRecord
from service.jobs.batch import BatchStatus
from service.jobs.request import BatchRequest

router = APIRouter(prefix="/v1/batches", tags=["batches"], dependencies=[KnownParameters])

_CANCELLED: dict[int | str, dict[str, Any]] = {
    202: {"description": "What had not ended is being cancelled, or was.", "model": Batch},
    204: {"description": "The batch is deleted, with its jobs and all that belongs to them."},
}


@router.post(
    "",
    status_code=202,
    response_model=Batch,
    dependencies=[Depends(takes_json)],
    responses=documented(*CREATION_ERRORS, *REPEATED, *NO_ROOM),
)
async def create_batch(
    request: Request,
    body: BatchRequest,
    state: State,
    caller: Caller,
    wait: Wait,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Create several jobs, all of them or none. With `Prefer: wait=N` the answer comes when all have ended."""

    async def waited(batch: BatchRecord) -> Response:
        ended = await state.wait_for_batch(request, batch.id, wait or 0, caller.tenant)
        return _accepted(ended, applied(wait))

    return await answer_once(
        state.manager.keys,
        key_of(caller.tenant, idempotency_key, "create_batch", body),
        lambda once: state.manager.submit_batch(body, caller.tenant, once),
        _accepted,
        None if wait is None else waited,
    )


@router.get("", response_model=BatchPage, responses=documented(InvalidRequest))
async def list_batches(manager: Manager, caller: Caller, limit: Limit = 50, after: AfterBatch = None) -> Response:
    """Batches, newest first."""
    batches, cursor = await manager.batches.find(tenant=caller.reach, limit=limit, after=after)
    return reply(BatchPage(data=[render.batch(batch, with_jobs=False) for batch in batches], next_cursor=cursor))


@router.get("/{batch_id}", response_model=Batch, responses=NOT_MODIFIED | documented(errors.NotFound, InvalidRequest))
async def get_batch(request: Request, batch_id: BatchId, state: State, caller: Caller, wait: Wait) -> Response:
    """A batch. With `Prefer: wait=N` the answer comes when all its jobs have ended, or after N seconds."""
    if wait is None:
        batch = await state.manager.batches.get(batch_id, caller.reach)
    else:
        batch = await state.wait_for_batch(request, batch_id, wait, caller.reach)
    return tagged_reply(request, dump(render.batch(batch)), headers=applied(wait))


@router.delete(
    "/{batch_id}",
    response_model=Batch,
    responses=_CANCELLED | documented(errors.NotFound, errors.NotTerminal, errors.JobInUse, InvalidRequest),
)
async def cancel_batch(
    batch_id: BatchId,
    manager: Manager,
    caller: Caller,
    purge: Annotated[
        bool,
        Query(
            description="Delete a batch that has ended, its jobs and all that is theirs; 409 `job_in_use` while one "
            "of them is the source of a job that waits or runs. "
            "Outputs written to a `uri` of their own stay."
        ),
    ] = False,
) -> Response:
    """Cancel all jobs that have not ended; a batch that has ended is answered as it is."""
    if purge:
        await manager.batches.purge(batch_id, caller.reach)
        return Response(status_code=204)
    before = await manager.batches.get(batch_id, caller.reach)
    batch = await manager.batches.cancel(batch_id, caller.reach)
    return reply(render.batch(batch), 200 if before.status is BatchStatus.ENDED else 202)


@router.get(
    "/{batch_id}/events",
    response_model=EventPage,
    dependencies=[HeldBatch],
    responses=DOCUMENTED | documented(errors.NotFound, InvalidRequest, NotAcceptable),
)
async def stream_batch_events(
    request: Request,
    batch_id: BatchId,
    manager: Manager,
    caller: Caller,
    after: EventId = None,
    last_event_id: LastEventId = None,
    limit: Limit = 50,
) -> Response:
    """The events of all jobs in one stream, under ids of its own, each with the `index` of its item.

    All behind an id, then those to come until the last job has ended. `limit` is for the page only.
    """
    media_type = choose(request.headers.get("accept"), (EVENT_STREAM, JSON))
    begin = last_event_id if last_event_id is not None else after or 0
    batches = manager.batches
    batch = await batches.get(batch_id, caller.reach)
    if media_type == JSON:
        return event_page(await batches.events(batch_id, after=begin, limit=limit + 1), limit, render.batch_event)
    if batch.status is BatchStatus.ENDED and not await batches.events(batch_id, after=begin, limit=1):
        return Response(status_code=204)
    return event_stream(batches.follow(batch_id, after=begin), render.batch_event, manager.watch.metrics)


def _accepted(batch: BatchRecord, headers: dict[str, str] | None = None) -> Response:
    return reply(render.batch(batch), 202, {"Location": render.batch_path(batch.id), **(headers or {})})
