"""Errors as answers: one table from class to status, and RFC 9457 for all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from service import errors
from service.api import http_errors
from service.api.pointers import field_problems
from service.api.problem_codes import CODES
from service.api.schemas.common import FieldProblem, Problem
from service.errors import ArrowQuantError
from service.logs import Bound

MEDIA_TYPE = "application/problem+json"
log = logging.getLogger(__name__)

#: Status by class; a class that is missing has that of its base.
STATUS: dict[type[ArrowQuantError], int] = {
    errors.RequestError: 422,
    errors.ForbiddenPath: 403,
    errors.ModelNotFound: 404,
    errors.StoreRefused: 403,
    errors.TargetInUse: 409,
    errors.BlobNotFound: 404,
    errors.BlobTooLarge: 413,
    errors.DigestMismatch: 400,
    errors.StorageQuotaExceeded: 429,
    http_errors.MalformedBody: 400,
    http_errors.BodyTooLarge: 413,
    http_errors.BodyTooSlow: 408,
    http_errors.LengthRequired: 411,
    http_errors.HeadTooSlow: 408,
    http_errors.HeadTooLarge: 431,
    http_errors.MalformedRequest: 400,
    http_errors.HostNotAllowed: 421,
    http_errors.TooManyConnections: 503,
    errors.ModelError: 422,
    errors.RunError: 500,
    errors.AccuracyTooLow: 422,
    errors.DiskFull: 507,
    errors.StoreUnavailable: 503,
    errors.Cancelled: 409,
    errors.TimedOut: 504,
    errors.PendingTimedOut: 504,
    errors.ServiceError: 409,
    errors.Unauthorized: 401,
    errors.ForbiddenScope: 403,
    errors.RateLimited: 429,
    errors.TooManyOpenJobs: 429,
    errors.NotFound: 404,
    errors.ArtifactsExpired: 410,
    errors.NotReady: 503,
    errors.QueueFull: 429,
    errors.LookupsBusy: 503,
    errors.Draining: 503,
    errors.IdempotencyKeyReused: 422,
    http_errors.MethodNotAllowed: 405,
    http_errors.NotAcceptable: 406,
    http_errors.UnsupportedMediaType: 415,
    http_errors.RangeNotSatisfiable: 416,
}
#: Seconds after which another try may succeed.
RETRY_AFTER_S: dict[type[ArrowQuantError], int] = {
    errors.QueueFull: 2,
    errors.LookupsBusy: 5,
    errors.IdempotencyKeyInFlight: 1,
    errors.Draining: 10,
    errors.StoreUnavailable: 10,
    errors.NotReady: 5,
    http_errors.TooManyConnections: 2,
    errors.UploadInProgress: 1,
    errors.RateLimited: 1,
    errors.TooManyOpenJobs: 5,
    errors.StorageQuotaExceeded: 60,
}
#: What the framework itself raises.
_FRAMEWORK: dict[int, tuple[type[ArrowQuantError], str]] = {
    400: (http_errors.MalformedBody, "the body could not be read as JSON"),
    404: (errors.NotFound, "there is nothing at this address"),
    405: (http_errors.MethodNotAllowed, "this address does not take {method}"),
    408: (http_errors.BodyTooSlow, "the body did not come in time"),
    413: (http_errors.BodyTooLarge, "the body is larger than this server takes"),
}


def status_of(error: type[ArrowQuantError]) -> int:
    """The HTTP status of an error class."""
    return next(STATUS[cls] for cls in error.__mro__ if cls in STATUS)


def title_of(error: type[ArrowQuantError]) -> str:
    """The first line of its docstring."""
    return (error.__doc__ or error.code).strip().splitlines()[0].rstrip(".")


def describe(error: ArrowQuantError, instance: str | None = None) -> Problem:
    """The problem object of an error."""
    pointer = error.pointer
    return problem(type(error), error.detail, instance, error.tensor, [(pointer, error.detail)] if pointer else [])


def problem(
    error: type[ArrowQuantError],
    detail: str,
    instance: str | None,
    tensor: str | None = None,
    pointers: list[tuple[str, str]] | None = None,
) -> Problem:
    """A problem object from its parts; `pointers` are pairs of pointer and detail."""
    return Problem(
        type=f"/problems/{error.code}",
        title=title_of(error),
        status=status_of(error),
        detail=detail,
        code=error.code,
        instance=instance,
        tensor=tensor,
        errors=[FieldProblem(pointer=p, detail=d) for p, d in pointers] if pointers else None,
    )


def failure(code: str, detail: str, instance: str, tensor: str | None, pointer: str | None) -> Problem:
    """The problem object of a job that failed, from what its record keeps."""
    cls = CODES.get(code, errors.InternalError)
    return problem(cls, detail, instance, tensor, [(pointer, detail)] if pointer else [])


def respond(error: ArrowQuantError, request: Request, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that an error makes."""
    retry = next((RETRY_AFTER_S[cls] for cls in type(error).__mro__ if cls in RETRY_AFTER_S), None)
    extra = {"Retry-After": str(retry)} if retry else {}
    return _response(request, describe(error, request.scope["path"]), {**extra, **(headers or {})})


def install(app: FastAPI) -> None:
    """Make every error of this application a problem."""
    app.add_exception_handler(ArrowQuantError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_framework)
    app.add_exception_handler(Exception, _on_crash)


def documented(*classes: type[ArrowQuantError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation that may raise these."""
    found: dict[int | str, dict[str, Any]] = {}
    for cls in sorted(classes, key=status_of):
        entry = found.setdefault(status_of(cls), {"description": "", "content": _CONTENT})
        entry["description"] = "; ".join(filter(None, [entry["description"], f"`{cls.code}`: {title_of(cls)}"]))
        if cls in RETRY_AFTER_S:
            entry["headers"] = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
    return found


_CONTENT = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
#: Stands on every operation: any other error has the same form.
DEFAULT_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"description": "Anything that goes wrong is a problem object.", "content": _CONTENT}
}


def _response(request: Request, body: Problem, headers: Mapping[str, str]) -> Response:
    if (observed := request.scope.get("observed")) is not None:
        observed.problem = body.code
    content = body.model_dump_json(exclude_none=True)
    return Response(content, body.status, headers, media_type=MEDIA_TYPE)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ArrowQuantError)
    if status_of(type(error)) != 500:
        return respond(error, request)
    return await _on_crash(request, error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if found and found[0]["type"] == "json_invalid":
        detail = f"the body is not JSON: {found[0]['ctx']['error']} at character {found[0]['loc'][-1]}"
        return respond(http_errors.MalformedBody(detail), request)
    fields = field_problems(found, error.body)
    first = fields[0]
    more = f" (and {len(fields) - 1} more)" if len(fields) > 1 else ""
    detail = f"{first.pointer or first.parameter or 'the body'}: {first.detail}{more}"
    body = problem(http_errors.InvalidRequest, detail, request.scope["path"]).model_copy(update={"errors": fields})
    return _response(request, body, {})


async def _on_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    cls, detail = _FRAMEWORK.get(error.status_code, (http_errors.InvalidRequest, str(error.detail)))
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed(request))
    return respond(cls(detail.format(method=request.method)), request, headers)


def _allowed(request: Request) -> list[str]:
    # The framework names the methods of the first route that matches the path; each method has a route of its own.
    matching = [route for route in request.app.state.routes if route.path_regex.match(request.scope["path"])]
    methods = {method for route in matching for method in route.methods}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


async def _on_crash(request: Request, error: Exception) -> Response:
    # The only word of the cause goes to the log, under the id that the client is given.
    id_ = request.scope.get("request_id", "unknown")
    # A fault that nobody caught comes here from outside of all that knows the call.
    with Bound(request_id=id_):
        log.error("%s %s failed (%s)", request.method, request.scope["path"], id_, exc_info=error)
    fault = errors.InternalError(f"the service has a fault; its log says more under {id_}")
    # The server hangs up after a fault, and the client should know before it sends another call.
    return respond(fault, request, {"Connection": "close"})
