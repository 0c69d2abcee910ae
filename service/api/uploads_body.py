"""The body of an upload: which bytes of a blob it holds, and how they come."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.api.http_errors import BodyTooSlow, InvalidRequest, LengthRequired
from service.jobs.blobs import Span

#: Bytes that are worth a trip to a thread.
PIECE_BYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes\s+(?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})", re.IGNORECASE)


def span_of(request: Request) -> Span:
    """What `Content-Range` and `Content-Length` say; raises InvalidRequest or LengthRequired."""
    header = request.headers.get("content-range")
    given = request.headers.get("content-length")
    length = int(given) if given is not None and given.isdecimal() else None
    if header is None:
        if length is None:
            raise LengthRequired("say how long the file is: send Content-Length, or the length in Content-Range")
        return Span(0, length, length, is_anew=True)
    span = _span(header)
    expected = 0 if span.start is None else span.stop - span.start
    if length not in (None, expected):
        raise InvalidRequest(f"Content-Range {header!r} speaks of {expected} bytes, Content-Length of {length}")
    return span


def _span(header: str) -> Span:
    found = _CONTENT_RANGE.fullmatch(header.strip())
    if found is None:
        raise InvalidRequest(f"Content-Range is {header!r}; write it as bytes 0-99/1000, or bytes */1000 to send none")
    total = int(found[3])
    if found[1] is None:
        return Span(None, 0, total)
    first, last = int(found[1]), int(found[2])
    if not first <= last < total:
        raise InvalidRequest(
            f"Content-Range is {header!r}; the first byte comes before the last, and that before the end"
        )
    return Span(first, last + 1, total)


class UploadBody:
    """The body of a call in pieces, in memory one at a time."""

    def __init__(self, request: Request, idle_s: float) -> None:
        """`idle_s` is how long it may stand still."""
        self._chunks = request.stream()
        self._idle_s = idle_s
        #: Whether all of it has been read, or will never come.
        self.is_over = False
        self._is_slow = False

    async def pieces(self) -> AsyncGenerator[bytearray, None]:
        """What comes, up to the end or to where it is cut: the last piece is then what came before the cut."""
        piece = bytearray()
        while (chunk := await self._next()) is not None:
            piece += chunk
            if len(piece) >= PIECE_BYTES:
                yield piece
                piece = bytearray()
        if piece:
            yield piece

    def check_pace(self) -> None:
        """Raise BodyTooSlow when that is why no more came."""
        if self._is_slow:
            raise BodyTooSlow(f"nothing came for {self._idle_s:g} seconds: go on from Upload-Offset")

    async def _next(self) -> bytes | None:
        try:
            async with asyncio.timeout(self._idle_s):
                return await anext(self._chunks)
        except TimeoutError:
            self._is_slow = True
        except (StopAsyncIteration, ClientDisconnect):
            self.is_over = True
        return None
