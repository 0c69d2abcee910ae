"""A job's events: live as Server-Sent Events, or the log as a page."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service import errors
from service.api import render
from service.api.auth import Caller
from service.api.dependencies import HeldJob, JobId, KnownParameters, Limit, Manager
from service.api.event_replies import DOCUMENTED, EVENT_STREAM, EventId, LastEventId, event_page, event_stream
from service.api.http_errors import InvalidRequest, NotAcceptable
from service.api.negotiation import choose
from service.api.problems import documented
from service.api.replies import JSON
from service.api.schemas.events import EventPage

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[KnownParameters])


@router.get(
    "/{job_id}/events",
    response_model=EventPage,
    dependencies=[HeldJob],
    responses=DOCUMENTED | documented(errors.NotFound, InvalidRequest, NotAcceptable),
)
async def stream_job_events(
    request: Request,
    job_id: JobId,
    manager: Manager,
    caller: Caller,
    after: EventId = None,
    last_event_id: LastEventId = None,
    limit: Limit = 50,
) -> Response:
    """All events behind an id, then those to come until the job ends. `limit` is for the page only.

    Of a job with `events_expired_at` only the last event is left.
    """
    media_type = choose(request.headers.get("accept"), (EVENT_STREAM, JSON))
    begin = last_event_id if last_event_id is not None else after or 0
    job = await manager.jobs.get(job_id, caller.reach)
    if media_type == JSON:
        return event_page(await manager.jobs.events(job_id, after=begin, limit=limit + 1), limit, render.event)
    if job.status.is_terminal and not await manager.jobs.events(job_id, after=begin, limit=1):
        return Response(status_code=204)
    return event_stream(manager.jobs.follow(job_id, after=begin), render.event, manager.watch.metrics)
