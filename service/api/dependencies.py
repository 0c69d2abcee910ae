"""What routes ask for: the manager, a page of a list, a body of the right type."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request

from service.api.http_errors import InvalidRequest, UnsupportedMediaType
from service.api.negotiation import wait_of
from service.api.state import ApiState
from service.jobs.manager import JobManager

ARROW_STREAM = "application/vnd.apache.arrow.stream"


def _state(request: Request) -> ApiState:
    state: ApiState = request.app.state.api
    return state


def _manager(request: Request) -> JobManager:
    return _state(request).manager


def _takes(media_type: str, request: Request) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != media_type:
        raise UnsupportedMediaType(f"send the body with `Content-Type: {media_type}`, not {given or 'without a type'}")


def takes_json(request: Request) -> None:
    """Raises UnsupportedMediaType unless the body is said to be JSON."""
    _takes("application/json", request)


def takes_arrow(request: Request) -> None:
    """Raises UnsupportedMediaType unless the body is said to be an Arrow stream."""
    _takes(ARROW_STREAM, request)


def _label(label: Annotated[str | None, Query(description="`key:value`.", max_length=257)] = None) -> Label:
    if label is None:
        return None
    key, colon, value = label.partition(":")
    if not (key and colon and value):
        raise InvalidRequest(f"label is {label!r}; write it as key:value")
    return key, value


def _wait(
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
