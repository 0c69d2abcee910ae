"""What a job measured: all of it as JSON or as a page, or the per-tensor table as Parquet or Arrow."""

from __future__ import annotations

import io
import json
from typing import Annotated, Any

import pyarrow as pa
from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request, Response

from service import errors
from service.api.auth import Caller
from service.api.dependencies import ARROW_STREAM, JobId, KnownParameters, Manager
from service.api.http_errors import InvalidRequest, NotAcceptable
from service.api.negotiation import choose
from service.api.problems import documented
from service.api.replies import JSON, NOT_MODIFIED, etag_of, tagged
from service.api.schemas.results import Report
from service.engine.report import RunReport
from service.engine.report_page import report_page

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[KnownParameters])

PARQUET = "application/vnd.apache.parquet"
HTML = "text/html"
#: The page is whole by itself: nothing that a name of a tensor might smuggle in would be run or fetched.
HTML_POLICY = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The report, a page that shows it, or its per-tensor table.",
        "content": {HTML: {"schema": {"type": "string"}}, PARQUET: _BINARY, ARROW_STREAM: _BINARY},
    }
}


@router.get(
    "/{job_id}/report",
    response_model=Report,
    responses=_DOCUMENTED
    | NOT_MODIFIED
    | documented(errors.NotFound, errors.NotFinished, NotAcceptable, InvalidRequest),
)
async def get_job_report(
    request: Request,
    job_id: JobId,
    manager: Manager,
    caller: Caller,
    output: Annotated[str | None, Query(max_length=64, description="Only this output; for the table.")] = None,
) -> Response:
    """The quality report."""
    media_type = choose(request.headers.get("accept"), (JSON, HTML, PARQUET, ARROW_STREAM))
    report = await manager.jobs.report(job_id, caller.reach)
    content, etag = await run_sync(_encode, report, media_type, output)
    headers = HTML_POLICY if media_type == HTML else {}
    return tagged(request, content, etag, media_type, headers | {"Vary": "Accept"})


def _encode(report: RunReport, media_type: str, output: str | None) -> tuple[bytes, str]:
    if media_type == JSON:
        content = json.dumps(_without_none(report.to_json()), separators=(",", ":"), allow_nan=False).encode()
    elif media_type == HTML:
        content = report_page(report).encode()
    elif media_type == PARQUET:
        content = _parquet(report.table(output))
    else:
        content = arrow_stream(report.table(output))
    return content, etag_of(content)


def _parquet(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq  # half of Arrow's libraries: few who start the server ask for this form

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def arrow_stream(table: pa.Table) -> bytes:
    """A table as an Arrow IPC stream."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value
