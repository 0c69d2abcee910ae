"""What routes ask for: the manager, a page of a list, a body of the right type.

All of them are coroutines although none waits: the framework calls plain functions in a thread, each in its turn.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import StringConstraints

from service.api.http_errors import UnsupportedMediaType
from service.api.negotiation import wait_of
from service.api.state import ApiState
from service.jobs.manager import JobManager

ARROW_STREAM = "application/vnd.apache.arrow.stream"


async def _state(request: Request) -> ApiState:
    state: ApiState = request.app.state.api
    return state


async def _manager(request: Request) -> JobManager:
    state: ApiState = request.app.state.api
    return state.manager


def _takes(media_type: str, request: Request) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != media_type:
        raise UnsupportedMediaType(f"send the body with `Content-Type: {media_type}`, not {given or 'without a type'}")


async def takes_json(request: Request) -> None:
    """Raises UnsupportedMediaType unless the body is said to be JSON."""
    _takes("application/json", request)


async def takes_arrow(request: Request) -> None:
    """Raises UnsupportedMediaType unless the body is said to be an Arrow stream."""
    _takes(ARROW_STREAM, request)


def wrong_parameter(name: str, detail: str) -> RequestValidationError:
    """The error of a query parameter that has the right type and yet no meaning."""
    return RequestValidationError([{"type": "value_error", "loc": ("query", name), "msg": detail, "input": None}])


async def _known_parameters(request: Request) -> None:
    known = sorted(_parameters_of(request.scope["route"].dependant))
    for name in request.query_params:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise wrong_parameter(name, f"this call has no such parameter; {takes}")


def _parameters_of(dependant: Any) -> set[str]:
    """Names of the query parameters of a route, or of something it depends on."""
    return {field.alias for field in dependant.query_params}.union(*map(_parameters_of, dependant.dependencies))


async def _hold_job(job_id: JobId, manager: Manager) -> AsyncIterator[None]:
    with manager.leases.held(job_id):
        yield


async def _hold_batch(batch_id: BatchId, manager: Manager) -> AsyncIterator[None]:
    with manager.leases.held(batch_id):
        yield


#: Only told: what is wrong with another text is said below in words.
_LABEL_FORM = {"pattern": r"^[^:]+:[\s\S]+$"}


async def _label(
    label: Annotated[
        str | None, Query(description="`key:value`.", max_length=257, json_schema_extra=_LABEL_FORM)
    ] = None,
) -> Label:
    if label is None:
        return None
    key, colon, value = label.partition(":")
    if not (key and colon and value):
        raise wrong_parameter("label", f"{label!r} is not of the form key:value")
    return key, value


async def _wait(
    prefer: Annotated[
        str | None, Header(description="`wait=N`: answer when the job has ended, or after N seconds.")
    ] = None,
) -> float | None:
    return wait_of(prefer)


def applied(wait: float | None) -> dict[str, str]:
    """The header that says what was made of `Prefer`."""
    return {} if wait is None else {"Preference-Applied": f"wait={wait:g}"}


Label = tuple[str, str] | None
State = Annotated[ApiState, Depends(_state)]
Manager = Annotated[JobManager, Depends(_manager)]
LabelFilter = Annotated[Label, Depends(_label)]
Wait = Annotated[float | None, Depends(_wait)]
JobId = Annotated[str, Path(description="`job_` and a UUID.")]
BatchId = Annotated[str, Path(description="`batch_` and a UUID.")]
Limit = Annotated[int, Query(ge=1, le=200, description="Length of a page.")]
After = Annotated[str | None, Query(max_length=1024, description="The `next_cursor` of the page before.")]
#: Of a list of jobs the cursor is a job's id; the job may have been purged since. Batches likewise.
AfterJob = Annotated[
    Annotated[str, StringConstraints(pattern=r"^job_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")] | None,
    Query(description="The `next_cursor` of the page before."),
]
AfterBatch = Annotated[
    Annotated[str, StringConstraints(pattern=r"^batch_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")] | None,
    Query(description="The `next_cursor` of the page before."),
]
#: On a route: what the call finds stays until its answer has been sent, however long that takes.
HeldJob = Depends(_hold_job)
HeldBatch = Depends(_hold_batch)
#: On a router: a parameter that a call does not have is refused. Ignored, a misspelt filter would find everything.
KnownParameters = Depends(_known_parameters)
