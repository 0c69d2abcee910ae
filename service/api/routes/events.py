"""A job's events: live as Server-Sent Events, or the log as a page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.sse import format_sse_event

from service import errors
from service.api import render
from service.api.dependencies import JobId, KnownParameters, Limit, Manager
from service.api.http_errors import InvalidRequest, NotAcceptable
from service.api.negotiation import choose
from service.api.problems import documented
from service.api.replies import JSON, ClosingStream, dump, reply
from service.api.schemas.events import EventPage
from service.jobs.events import Event, Silence
from service.jobs.manager import JobManager

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[KnownParameters])

EVENT_STREAM = "text/event-stream"
RETRY_MS = 3000
#: What the database can hold; nothing is ever given a larger id.
MAX_EVENT_ID = 2**63 - 1
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Vary": "Accept"}
_EventId = Annotated[int | None, Query(ge=0, le=MAX_EVENT_ID, description="Only events with a larger id.")]
_LastEventId = Annotated[
    int | None, Header(ge=0, le=MAX_EVENT_ID, description="As `after`, and goes before it; browsers send it.")
]

_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The stream; each `data` is an `Event` as JSON. Or, as JSON, a page of the log.",
        "content": {EVENT_STREAM: {"schema": {"type": "string", "contentMediaType": JSON}}},
    },
    204: {"description": "The job has ended and nothing follows behind this id."},
}


@router.get(
    "/{job_id}/events",
    response_model=EventPage,
    responses=_DOCUMENTED | documented(errors.NotFound, InvalidRequest, NotAcceptable),
)
async def stream_job_events(
    request: Request,
    job_id: JobId,
    manager: Manager,
    after: _EventId = None,
    last_event_id: _LastEventId = None,
    limit: Limit = 50,
) -> Response:
    """All events behind an id, then those to come until the job ends. `limit` is for the page only."""
    media_type = choose(request.headers.get("accept"), (EVENT_STREAM, JSON))
    begin = last_event_id if last_event_id is not None else after or 0
    job = await manager.get(job_id)
    if media_type == JSON:
        return await _page(manager, job_id, begin, limit)
    if job.status.is_terminal and not await manager.events(job_id, after=begin, limit=1):
        return Response(status_code=204)
    return ClosingStream(_stream(manager, job_id, begin), 200, _STREAM_HEADERS, EVENT_STREAM)


async def _page(manager: JobManager, job_id: str, after: int, limit: int) -> Response:
    found = await manager.events(job_id, after=after, limit=limit + 1)
    cursor = str(found[limit - 1].id) if len(found) > limit else None
    page = EventPage(data=[render.event(event) for event in found[:limit]], next_cursor=cursor)
    return reply(page, headers={"Cache-Control": "no-cache", "Vary": "Accept"})


async def _stream(manager: JobManager, job_id: str, after: int) -> AsyncGenerator[bytes, None]:
    yield format_sse_event(retry=RETRY_MS)
    async with aclosing(manager.follow(job_id, after=after)) as items:
        async for item in items:
            yield format_sse_event(comment="silence") if isinstance(item, Silence) else _frame(item)
            # Neither a full buffer nor a fast client is waited for, so a reader that catches up gives way here.
            await asyncio.sleep(0)


def _frame(event: Event) -> bytes:
    data = dump(render.event(event)).decode()
    return format_sse_event(data_str=data, event=event.type, id=None if event.id is None else str(event.id))
