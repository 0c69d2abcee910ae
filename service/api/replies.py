"""Answers with entity tags, and streams that close what they read from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Send

from service.api.schemas.common import Wire

log = logging.getLogger(__name__)

#: Bytes handed to the server at once.
CHUNK_BYTES = 1 << 20
JSON = "application/json"


def etag_of(content: bytes | memoryview) -> str:
    """A strong entity tag of these bytes."""
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def is_known(request: Request, etag: str) -> bool:
    """Whether the client says in `If-None-Match` that it has this already."""
    given = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return etag in given or given == ["*"]


def dump(model: Wire) -> bytes:
    """A wire model as JSON, what is None left out."""
    return model.model_dump_json(exclude_none=True, by_alias=True).encode()


def reply(model: Wire, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A wire model as an answer."""
    return Response(dump(model), status, headers, JSON)


def tagged_reply(
    request: Request, content: bytes, media_type: str = JSON, headers: Mapping[str, str] | None = None
) -> Response:
    """Bytes with their entity tag, or 304 when the client has them."""
    return tagged(request, content, etag_of(content), media_type, headers)


def tagged(
    request: Request, content: bytes, etag: str, media_type: str, headers: Mapping[str, str] | None = None
) -> Response:
    """As `tagged_reply`, for a tag that is known already."""
    all_headers = {"Cache-Control": "no-cache", **(headers or {}), "ETag": etag}
    if is_known(request, etag):
        return Response(None, 304, all_headers)
    return bytes_reply(content, media_type, all_headers)


def bytes_reply(
    content: bytes | memoryview, media_type: str = JSON, headers: Mapping[str, str] | None = None
) -> Response:
    """Bytes; many of them in pieces, so that no single copy holds the event loop up."""
    view = memoryview(content)

    async def pieces() -> AsyncGenerator[memoryview, None]:
        for start in range(0, len(view), CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]

    return ClosingStream(pieces(), 200, {**(headers or {}), "Content-Length": str(len(view))}, media_type)


class SourceGone(Exception):
    """What an answer is made from was removed or cut short while it was sent, as by a purge."""


class ClosingStream(StreamingResponse):
    """Closes its generator when the client has gone, at once and not when it is collected.

    A generator that raises SourceGone has the connection cut, by which the client sees that the answer is not whole.
    """

    def __init__(
        self,
        content: AsyncGenerator[bytes, None] | AsyncGenerator[memoryview, None],
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str | None = None,
    ) -> None:
        super().__init__(content, status_code, headers, media_type)
        self._generator = content

    async def stream_response(self, send: Send) -> None:
        """Send all of it."""
        try:
            async with aclosing(self._generator):
                await super().stream_response(send)
        except SourceGone as gone:
            # Nothing else can be told any more; an answer that is not completed makes the server hang up.
            log.warning("a download was cut off: %s", gone)


#: For operations that answer with `tagged`.
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "The client has it already (`If-None-Match`)."}}
