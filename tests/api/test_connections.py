"""Connections: bodies on their way from the socket to the application."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from service.api.connections import BoundedProtocol, ConnectionLimits, bounded

LIMITS = ConnectionLimits(count=10, head_s=60, unread_s=60)


class Pieces:
    """An application that answers with the digest of the body, and keeps what it came in."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        digest, is_over = hashlib.sha256(), False
        while not is_over:
            message = await receive()
            self.taken.append(message["body"])
            digest.update(message["body"])
            is_over = not message["more_body"]
        content = digest.hexdigest().encode()
        headers = [(b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


@asynccontextmanager
async def served(app: Pieces, protocol: type[BoundedProtocol]) -> AsyncIterator[tuple[str, int]]:
    """The address at which the protocol, in a server of asyncio's own, hands calls to the application."""
    config = Config(app, lifespan="off", log_config=None)
    config.load()
    make: Callable[[], BoundedProtocol] = lambda: protocol(config=config, server_state=ServerState(), app_state={})  # noqa: E731
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()


async def asked(address: tuple[str, int], *calls: bytes) -> list[str]:
    """The answers to calls that are sent one behind the other, without waiting."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"".join(calls))
    answers = []
    for _ in calls:
        await reader.readuntil(b"\r\n\r\n")
        answers.append((await reader.readexactly(64)).decode())
    writer.close()
    await writer.wait_closed()
    return answers


def post(body: bytes) -> bytes:
    return f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def post_chunked(body: bytes) -> bytes:
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    return b"%s%x\r\n%s\r\n0\r\n\r\n" % (head, len(body), body)


@pytest.mark.parametrize(
    ("made", "size"), [*((post, size) for size in (0, 1, 70_000, 5_000_001)), (post_chunked, 5_000_001)]
)
async def test_bodies_arrive_whole_and_what_follows_them_is_the_next_call(
    made: Callable[[bytes], bytes], size: int, rng: np.random.Generator
) -> None:
    bodies = [rng.bytes(size), rng.bytes(300), rng.bytes(size + 1)]
    async with served(Pieces(), bounded(LIMITS)) as address:
        answers = await asked(address, *map(made, bodies))
    assert answers == [hashlib.sha256(body).hexdigest() for body in bodies]


async def test_the_pieces_of_a_large_body_are_not_copied(rng: np.random.Generator) -> None:
    received: list[bytes] = []

    class Noting(bounded(LIMITS)):  # type: ignore[misc]
        def data_received(self, data: bytes) -> None:
            received.append(data)
            super().data_received(data)

    app, body = Pieces(), rng.bytes(8_000_000)
    async with served(app, Noting) as address:
        await asked(address, post(body))
    same = set(map(id, received)) & set(map(id, app.taken))
    assert sum(len(piece) for piece in received if id(piece) in same) > 0.8 * len(body)
