"""The files that a job wrote: list, download, and all of them as one tar."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response

from service import errors
from service.api.archive import archive, archive_bytes, archive_etag, file_range
from service.api.auth import Caller
from service.api.dependencies import After, HeldJob, JobId, KnownParameters, Limit, Manager, wrong_parameter
from service.api.http_errors import InvalidRequest, RangeNotSatisfiable
from service.api.problems import documented, respond
from service.api.ranges import Unsatisfiable, parse_range
from service.api.render import job_path
from service.api.replies import NOT_MODIFIED, ClosingStream, dump, is_known, tagged_reply
from service.api.schemas.results import ArtifactInfo, ArtifactPage
from service.jobs.contents import Contents
from service.jobs.job import Artifact, Job, Status

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[KnownParameters])

TAR = "application/x-tar"
#: What opening a file may meet that was written to a store.
FROM_STORES = (errors.StoreRefused, errors.StoreUnavailable, errors.SourceChanged)
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


@router.get(
    "/{job_id}/artifacts",
    response_model=ArtifactPage,
    responses=NOT_MODIFIED | documented(errors.NotFound, errors.ArtifactsExpired, InvalidRequest),
)
async def list_job_artifacts(
    request: Request, job_id: JobId, manager: Manager, caller: Caller, limit: Limit = 50, after: After = None
) -> Response:
    """Every file that the job wrote and that is still there, by path; none before it has succeeded."""
    job = await manager.jobs.get(job_id, caller.reach)
    kept = [a for a in job.artifacts if job.is_kept(a)]
    if job.artifacts and not kept:
        raise _expired(job)
    if after is not None and after not in {a.path for a in kept}:
        raise wrong_parameter("after", "it is not a `next_cursor` of this list")
    behind = sorted((a for a in kept if after is None or a.path > after), key=lambda a: a.path)
    page = behind[:limit]
    cursor = page[-1].path if len(behind) > limit else None
    data = [ArtifactInfo(path=a.path, size_bytes=a.size_bytes, sha256=a.sha256, media_type=a.media_type) for a in page]
    return tagged_reply(request, dump(ArtifactPage(data=data, next_cursor=cursor)))


@router.get(
    "/{job_id}/artifacts/{path:path}",
    response_class=Response,
    dependencies=[HeldJob],
    responses={
        200: {"description": "The file.", "content": {"application/octet-stream": _BINARY}},
        206: {"description": "The range asked for.", "content": {"application/octet-stream": _BINARY}},
    }
    | NOT_MODIFIED
    | documented(errors.NotFound, errors.ArtifactsExpired, RangeNotSatisfiable, InvalidRequest, *FROM_STORES),
)
async def download_job_artifact(
    request: Request, job_id: JobId, path: str, manager: Manager, caller: Caller
) -> Response:
    """A file, or one range of it; the entity tag is its SHA-256."""
    job = await manager.jobs.get(job_id, caller.reach)
    # Only what the job lists is ever opened, so no path can lead elsewhere.
    artifact = next((a for a in job.artifacts if a.path == path), None)
    if artifact is None:
        raise errors.NotFound(f"job {job_id} has no artifact {path!r}; they are listed at {job_path(job_id)}/artifacts")
    if not job.is_kept(artifact):
        raise _expired(job)
    headers = {
        "ETag": f'"{artifact.sha256}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": _attachment(Path(path).name),
    }
    if is_known(request, headers["ETag"]):
        return Response(None, 304, headers)
    await run_sync(manager.contents.check, artifact, limiter=manager.contents.threads_for(artifact))
    return _send(request, manager.contents, artifact, headers)


@router.get(
    "/{job_id}/archive",
    response_class=Response,
    dependencies=[HeldJob],
    responses={200: {"description": "An uncompressed tar of all artifacts.", "content": {TAR: _BINARY}}}
    | NOT_MODIFIED
    | documented(errors.NotFound, errors.NotFinished, errors.ArtifactsExpired, InvalidRequest, *FROM_STORES),
)
async def download_job_archive(request: Request, job_id: JobId, manager: Manager, caller: Caller) -> Response:
    """All of the job's files as one tar; gone as soon as one of them is."""
    job = await manager.jobs.get(job_id, caller.reach)
    _check_succeeded(job)
    if not all(map(job.is_kept, job.artifacts)):
        raise _expired(job)
    headers = {
        "ETag": archive_etag(job.artifacts),
        "Content-Length": str(archive_bytes(job.artifacts)),
        "Content-Disposition": _attachment(f"{job.id}.tar"),
    }
    if is_known(request, headers["ETag"]):
        return Response(None, 304, {"ETag": headers["ETag"]})
    for artifact in job.artifacts:
        await run_sync(manager.contents.check, artifact, limiter=manager.contents.threads_for(artifact))
    return ClosingStream(archive(manager.contents, job.artifacts), 200, headers, TAR)


def _send(request: Request, contents: Contents, artifact: Artifact, headers: dict[str, str]) -> Response:
    size = artifact.size_bytes
    fresh = request.headers.get("if-range", headers["ETag"]) == headers["ETag"]
    try:
        span = parse_range(request.headers.get("range"), size) if fresh else None
    except Unsatisfiable:
        error = RangeNotSatisfiable(f"{artifact.path} has {size} bytes; the range lies outside")
        return respond(error, request, {"Content-Range": f"bytes */{size}"})
    start, stop = span or (0, size)
    headers |= {"Content-Length": str(stop - start)}
    if span:
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    pieces = file_range(contents, artifact, start, stop)
    return ClosingStream(pieces, 206 if span else 200, headers, artifact.media_type)


def _check_succeeded(job: Job) -> None:
    if job.status is not Status.SUCCEEDED:
        raise errors.NotFinished(f"job {job.id} is {job.status}: it has no files")


def _expired(job: Job) -> errors.ArtifactsExpired:
    return errors.ArtifactsExpired(
        f"the files of job {job.id} were kept until {job.artifacts_expired_at:%Y-%m-%d %H:%M:%S} UTC; its report is "
        f"still at {job_path(job.id)}/report"
    )


def _attachment(name: str) -> str:
    return f"attachment; filename*=utf-8''{quote(name, safe='')}"
