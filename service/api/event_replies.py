"""Events as an answer: a stream that goes on, or a page of what is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Header, Query, Response
from fastapi.sse import format_sse_event

from service.api.replies import ClosingStream, dump, reply
from service.api.schemas import events as wire
from service.jobs.events import TOO_SLOW, Event, Following, Silence
from service.jobs.metrics import JobMetrics

EVENT_STREAM = "text/event-stream"
RETRY_MS = 3000
#: Handed over at once.
MAX_FRAMES = 64
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Vary": "Accept"}

#: What the database can hold; nothing is ever given a larger id.
MAX_EVENT_ID = 2**63 - 1

EventId = Annotated[int | None, Query(ge=0, le=MAX_EVENT_ID, description="Only events with a larger id.")]
LastEventId = Annotated[
    int | None, Header(ge=0, le=MAX_EVENT_ID, description="As `after`, and goes before it; browsers send it.")
]

DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The stream; each `data` is an `Event` as JSON. Or, as JSON, a page of the log.",
        "content": {EVENT_STREAM: {"schema": {"$ref": "#/components/schemas/StreamedEvent"}}},
    },
    204: {"description": "All has ended and nothing follows behind this id."},
}

#: How an event is shown.
Show = Callable[[Event], wire.Event]

KEPT_FRAMES = 2048
#: Frames of the newest events, each with its event: so no other can have the same identity meanwhile.
_newest: dict[tuple[int, Show], tuple[Event, bytes]] = {}


def event_page(found: Sequence[Event], limit: int, show: Show) -> Response:
    """The first `limit` of these events, of which there is one more where another page follows."""
    cursor = str(found[limit - 1].id) if len(found) > limit else None
    page = wire.EventPage(data=[show(event) for event in found[:limit]], next_cursor=cursor)
    return reply(page, headers={"Cache-Control": "no-cache", "Vary": "Accept"})


def event_stream(items: Following, show: Show, metrics: JobMetrics) -> Response:
    """All that is followed, until that ends."""
    return ClosingStream(_frames(items, show, metrics), 200, _STREAM_HEADERS, EVENT_STREAM)


async def _frames(followed: Following, show: Show, metrics: JobMetrics) -> AsyncGenerator[bytes, None]:
    opened_at = datetime.now(UTC)
    async with aclosing(followed) as items:
        yield format_sse_event(retry=RETRY_MS)
        frames: list[bytes] = []
        events: list[Event] = []
        async for item in items:
            if isinstance(item, Silence):
                yield format_sse_event(comment="silence")
                continue
            events.append(item)
            # What is replayed is this reader's alone.
            frames.append(_shared_frame(item, show) if item.at >= opened_at else _frame(item, show))
            # What is here already goes in one piece: handing over a piece costs more than making a frame.
            if items.has_more and len(frames) < MAX_FRAMES:
                continue
            yield b"".join(frames)
            _observe(events, opened_at, metrics)
            frames.clear()
            events.clear()
            # Neither a full buffer nor a fast client is waited for, so a reader that catches up gives way here.
            await asyncio.sleep(0)


def _observe(events: Sequence[Event], opened_at: datetime, metrics: JobMetrics) -> None:
    now = datetime.now(UTC)
    for event in events:
        # What is replayed is not late.
        if event.at >= opened_at:
            metrics.event_lag.observe((now - event.at).total_seconds())
            metrics.readers_cut.inc(event.type == TOO_SLOW)


def _shared_frame(event: Event, show: Show) -> bytes:
    """As `_frame`, made once for all who are shown the event while it is new."""
    key = (id(event), show)
    if (kept := _newest.get(key)) is None:
        kept = _newest[key] = (event, _frame(event, show))
        if len(_newest) > KEPT_FRAMES:
            del _newest[next(iter(_newest))]
    return kept[1]


def _frame(event: Event, show: Show) -> bytes:
    data = dump(show(event)).decode()
    return format_sse_event(data_str=data, event=event.type, id=None if event.id is None else str(event.id))
