"""What surrounds every call: an id, a limit on the body, HEAD, and headers that keep browsers careful."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils import uuid7

from service.api.early import EarlyReply, send_and_linger
from service.api.http_errors import BodyTooLarge, MalformedRequest
from service.api.problems import respond

_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
#: A body that comes at this pace, or faster, is never too slow.
MIN_BYTES_PER_S = 64 << 10
#: Nothing served here is meant to run or to be framed in a browser.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


class RequestId:
    """Gives each call an id, the client's own where it sends a proper `X-Request-ID`, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        id_ = given if _ACCEPTED_ID.fullmatch(given) else f"req_{uuid7()}"
        scope["request_id"] = id_

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = id_
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_with_headers)


class BodyLimit:
    """Answers 413 to a body of more bytes than its path allows, at the latest when they have come.

    `limits` are bytes by the beginning of a path; the first that fits holds. The empty one fits all, and comes last.
    """

    def __init__(self, app: ASGIApp, limits: Mapping[str, int]) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = next(limit for prefix, limit in self.limits.items() if scope["path"].startswith(prefix))
        received, refused = 0, False

        async def receive_counted() -> Message:
            nonlocal received, refused
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                refused = True
                # An HTTPException, because the framework turns any other into "400".
                raise HTTPException(413, headers={"Connection": "close"})
            return message

        async def send_to_the_end(message: Message) -> None:
            await (send_and_linger(message, receive, send) if refused else send(message))

        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            error = BodyTooLarge(f"the body has {declared} bytes; this call takes at most {limit}")
            await EarlyReply(respond(error, Request(scope)))(scope, receive, send)
            return
        await self.app(scope, receive_counted, send_to_the_end)


class OneLength:
    """Refuses a call that gives its length in two ways, and hangs up.

    Something in front of this server may have read it in the other way, and take what follows for another's call.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "http" and {"content-length", "transfer-encoding"}.issubset(Headers(scope=scope).keys()):
            error = MalformedRequest("the call has both Content-Length and Transfer-Encoding: send one of them")
            await respond(error, Request(scope), {"Connection": "close"})(scope, receive, send)
            return
        await self.app(scope, receive, send)


class BodyPace:
    """Answers 408 to a body that comes too slowly. Paths that begin with `own` see to that themselves."""

    def __init__(self, app: ASGIApp, own: str, timeout_s: float) -> None:
        """`timeout_s` is how long a body may take beside the time that its bytes are good for."""
        self.app = app
        self.own = own
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http" or scope["path"].startswith(self.own):
            await self.app(scope, receive, send)
            return
        due = asyncio.get_running_loop().time() + self.timeout_s
        is_over = has_begun = False

        async def receive_in_time() -> Message:
            nonlocal due, is_over
            if is_over:
                return await receive()
            try:
                async with asyncio.timeout_at(due):
                    message = await receive()
            except TimeoutError:
                if has_begun:  # nothing else can be told any more
                    return {"type": "http.disconnect"}
                # An HTTPException, because the framework turns any other into "400".
                raise HTTPException(408, headers={"Connection": "close"}) from None
            is_over = not message.get("more_body")
            due += len(message.get("body", b"")) / MIN_BYTES_PER_S
            return message

        async def send_noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        await self.app(scope, receive_in_time, send_noting)


class Head:
    """Serves HEAD wherever there is GET: the same headers, and the body is cut off where it starts.

    Paths that begin with `own` have a HEAD of their own.
    """

    def __init__(self, app: ASGIApp, own: str) -> None:
        self.app = app
        self.own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http" or scope["method"] != "HEAD" or scope["path"].startswith(self.own):
            await self.app(scope, receive, send)
            return
        ended = False

        async def send_start_only(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                await send(message)
            elif not ended:
                # The server now tells `receive` that the client is gone, at which a stream stops.
                ended = True
                await send({"type": "http.response.body", "body": b""})

        await self.app({**scope, "method": "GET"}, receive, send_start_only)
