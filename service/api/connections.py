"""What a connection may cost: how many there are, how long a call's head may take to come, how long nobody may read.

uvicorn alone waits for ever for the end of a head, and for a reader of an answer.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
from h11._readers import ContentLengthReader
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.api.http_errors import HeadTooLarge, HeadTooSlow, MalformedRequest, TooManyConnections
from service.api.problems import MEDIA_TYPE, RETRY_AFTER_S, describe, status_of
from service.errors import ArrowQuantError

#: Bytes of a request's line and headers together.
MAX_HEAD_BYTES = 32 << 10
#: From how many bytes on a piece of a body is not copied. Smaller ones gather while the application is busy.
MIN_PIECE_BYTES = 16 << 10
#: Descriptors that are left to everything but connections.
OTHER_FILES = 256


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds on connections; times in seconds."""

    count: int
    head_s: float
    unread_s: float

    def within_descriptors(self) -> ConnectionLimits:
        """As many as this process may open files for; it allows itself as many as it can."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        room = self.count if hard == resource.RLIM_INFINITY else max(1, hard - OTHER_FILES)
        return ConnectionLimits(min(self.count, room), self.head_s, self.unread_s)


class BoundedConnection(h11.Connection):
    """Reads calls whose heads are not too large, however many bytes come at once.

    h11 alone counts only those that are not whole.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        #: Whether that is why it reads no more.
        self.is_too_large = False

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """As h11's; raises RemoteProtocolError as well where a head is whole and too large."""
        unread = len(self.trailing_data[0]) if self.their_state is h11.IDLE else 0
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.is_too_large = error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise
        if isinstance(event, h11.Request) and unread - len(self.trailing_data[0]) > MAX_HEAD_BYTES:
            self.is_too_large = True
            raise h11.RemoteProtocolError("the head is too large")
        return event

    def skip(self, count: int) -> bool:
        """Count so many bytes as read, if a body of known length is being read and goes on behind them."""
        reader = self._reader
        if not isinstance(reader, ContentLengthReader) or self._receive_buffer or count >= reader._remaining:
            return False
        reader._remaining -= count
        return True


class BoundedProtocol(H11Protocol):
    """A connection that ends when its client is too slow, and is refused when there are too many."""

    #: Set on the class that `bounded` makes.
    limits: ConnectionLimits

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn: BoundedConnection = BoundedConnection()
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or refuse."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.count:
            self._refuse(TooManyConnections(f"{self.limits.count} connections are open: try again in a moment"))
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take what comes; a head that has begun has to end in time."""
        if self.transport.is_closing() or self._pass_on(data):
            return
        super().data_received(data)
        self._await_head()

    def _pass_on(self, data: bytes) -> bool:
        """Give the application a piece of a body as it came; False where that is not all there is to do.

        h11 would copy it three times, and uvicorn twice.
        """
        is_body = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is not h11.DONE
        if not is_body or len(data) < MIN_PIECE_BYTES or self.cycle.body or not self.conn.skip(len(data)):
            return False
        self.cycle.body = data  # type: ignore[assignment]
        self.flow.pause_reading()
        self.cycle.message_event.set()
        return True

    def on_response_complete(self) -> None:
        """Go on with the next call, whose head may be here in part."""
        super().on_response_complete()
        if self.conn.trailing_data[0]:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._forget_head()
        self._forget_unread()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is sent to."""
        super().pause_writing()
        self._unread_timer = self.loop.call_later(self.limits.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        self._forget_unread()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Answer what is no HTTP with a problem, if an answer is not on its way already."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        if self.conn.is_too_large:
            self._refuse(HeadTooLarge(f"the request's line and headers have more than {MAX_HEAD_BYTES} bytes"))
        else:
            self._refuse(MalformedRequest("what came is not a request of HTTP/1.1"))

    def _await_head(self) -> None:
        """Have a timer run while, and only while, a head is due, or the rest of a body that has its answer already."""
        is_due = self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE
        if not is_due or self.transport.is_closing():
            self._forget_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.head_s, self._head_too_slow)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _forget_unread(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _head_too_slow(self) -> None:
        self._head_timer = None
        if self.conn.our_state is h11.DONE:
            self.transport.abort()
        elif not self.transport.is_closing():
            self._refuse(HeadTooSlow(f"the headers have not come within {self.limits.head_s:g} s"))

    def _refuse(self, error: ArrowQuantError) -> None:
        """Answer and hang up, without asking the application."""
        content = describe(error).model_dump_json(exclude_none=True).encode()
        status = status_of(type(error))
        retry = f"Retry-After: {RETRY_AFTER_S[type(error)]}\r\n" if type(error) in RETRY_AFTER_S else ""
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {MEDIA_TYPE}\r\n{retry}"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.close()


def bounded(limits: ConnectionLimits) -> type[BoundedProtocol]:
    """The protocol with these limits, for uvicorn to make connections of."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})
