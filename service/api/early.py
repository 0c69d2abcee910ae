"""Answers that come before the body of their call was read."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

#: How long the rest of a body that was refused may go on coming.
LINGER_S = 5.0


class EarlyReply(Response):
    """An answer that is sent at once, after which the rest of the body is let come for a while."""

    def __init__(self, reply: Response) -> None:
        super().__init__(reply.body, reply.status_code, dict(reply.headers) | {"Connection": "close"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""

        async def send_lingering(message: Message) -> None:
            await send_and_linger(message, receive, send)

        await super().__call__(scope, receive, send_lingering)


async def send_and_linger(message: Message, receive: Receive, send: Send) -> None:
    """Send a part of an answer; before its end the rest of the body is let come, and nobody reads it.

    Closing a connection on bytes that were not read resets it, and the client might never see the answer.
    """
    if message["type"] == "http.response.body":
        await send({**message, "more_body": True})
        with suppress(TimeoutError, HTTPException):
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body"):
                    pass
        message = {"type": "http.response.body", "body": b""}
    await send(message)
