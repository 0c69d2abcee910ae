"""Uploads: files under their SHA-256, sent whole or in pieces that are taken up where they were cut."""

from __future__ import annotations

from typing import Annotated, Any

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Path, Request, Response

from service import errors
from service.api.auth import Caller
from service.api.dependencies import KnownParameters, State
from service.api.early import EarlyReply
from service.api.http_errors import BodyTooLarge, BodyTooSlow, InvalidRequest, LengthRequired
from service.api.problems import documented, respond, status_of
from service.api.state import ApiState
from service.api.uploads_body import UploadBody, span_of
from service.jobs.blobs import Span, Upload

PREFIX = "/v1/blobs/"
router = APIRouter(prefix="/v1/blobs", tags=["blobs"], dependencies=[KnownParameters])

Digest = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="SHA-256 of the file, in lower-case hexadecimal.")]
ContentRange = Annotated[
    str | None,
    Header(description="`bytes 0-99/1000` sends a piece; `bytes */1000` none, and completes a blob that is all here."),
]

_OFFSET = {"Upload-Offset": {"description": "Bytes that are here.", "schema": {"type": "integer"}}}
_BINARY: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_SIZE = {"Content-Length": {"description": "Bytes of the blob.", "schema": {"type": "integer"}}}
_KNOWN: dict[int | str, dict[str, Any]] = {200: {"description": "The blob is there.", "headers": _SIZE}}
_SENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The blob was there already; the body was not needed."},
    201: {"description": "The blob is complete.", "headers": _OFFSET},
    202: {"description": "The piece is stored, more is needed.", "headers": _OFFSET},
}


@router.head(
    "/sha256:{digest}", response_class=Response, responses=_KNOWN | documented(errors.BlobNotFound, InvalidRequest)
)
async def check_blob(request: Request, digest: Digest, caller: Caller, state: State) -> Response:
    """Whether a blob is there; if it is not, the header `Upload-Offset` says how much of it has come.

    What other tenants have sent does not count.
    """
    blobs = state.manager.blobs
    size = await run_sync(blobs.find, caller.tenant, digest, limiter=state.uploads)
    if size is not None:
        return Response(None, 200, {"Content-Length": str(size)})
    offset = await run_sync(blobs.offset, caller.tenant, digest, limiter=state.uploads)
    missing = errors.BlobNotFound(f"sha256:{digest} is not among your blobs; {offset} bytes of it have come")
    return respond(missing, request, {"Upload-Offset": str(offset)})


@router.put(
    "/sha256:{digest}",
    status_code=201,
    response_class=Response,
    responses=_SENT
    | documented(
        errors.DigestMismatch,
        BodyTooSlow,
        errors.UploadInProgress,
        errors.UploadOffsetMismatch,
        LengthRequired,
        errors.BlobTooLarge,
        errors.StorageQuotaExceeded,
        BodyTooLarge,
        InvalidRequest,
        errors.Draining,
        errors.DiskFull,
    ),
    openapi_extra={"requestBody": {"required": True, "content": _BINARY}},
)
async def upload_blob(
    request: Request,
    digest: Digest,
    caller: Caller,
    state: State,
    content_range: ContentRange = None,  # noqa: ARG001 - documents what `span_of` reads
) -> Response:
    """Send a file whole, or a piece of it with `Content-Range`. What is stored before a cut is kept.

    A piece has to start where the last one ended. The blob is complete when all bytes are here and
    have the SHA-256 of its name; with another one nothing is kept.
    """
    body = UploadBody(request, state.settings.upload_idle_s)
    try:
        reply = await _take(request, body, caller.tenant, digest, state)
    except errors.ArrowQuantError as error:
        if status_of(type(error)) == 500:
            raise
        offset = await run_sync(state.manager.blobs.offset, caller.tenant, digest, limiter=state.uploads)
        reply = respond(error, request, {"Upload-Offset": str(offset)})
    return reply if body.is_over else EarlyReply(reply)


async def _take(request: Request, body: UploadBody, tenant: str, digest: str, state: ApiState) -> Response:
    if state.closing.is_set():
        raise errors.Draining("the server is shutting down: go on when it is back")
    span = span_of(request)
    blobs = state.manager.blobs
    if await run_sync(blobs.find, tenant, digest, limiter=state.uploads) is not None:
        return Response(None, 200)
    upload = await run_sync(blobs.begin, tenant, digest, span, limiter=state.uploads)
    try:
        await _store(body, upload, span, state)
        is_whole = await run_sync(upload.finish, limiter=state.uploads)
    finally:
        with anyio.CancelScope(shield=True):
            await run_sync(upload.close, limiter=state.uploads)
    body.check_pace()
    return Response(None, 201 if is_whole else 202, {"Upload-Offset": str(upload.offset)})


async def _store(body: UploadBody, upload: Upload, span: Span, state: ApiState) -> None:
    async for piece in body.pieces():
        if len(piece) > upload.room:
            raise InvalidRequest(f"the body goes on behind byte {span.stop}, where Content-Range says that it ends")
        await run_sync(upload.write, piece, limiter=state.uploads)
