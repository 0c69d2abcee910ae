"""Looks at every call from outside: counts it, times it, and writes the line of the log that says what became of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import Principal
from service.api.state import ApiState
from service.errors import InternalError
from service.logs import Bound

log = logging.getLogger("service.access")

#: Probes and scrapes would fill the log.
UNLOGGED = frozenset({"/healthz", "/readyz", "/metrics"})
#: How long these take is up to the client and its connection.
UNTIMED = frozenset(
    {"/v1/jobs/{job_id}/archive", "/v1/jobs/{job_id}/artifacts/{path:path}", "/v1/blobs/sha256:{digest}"}
)
UNMATCHED = "(none)"
#: A client that has gone before the answer began, as proxies write it.
NO_ANSWER = 499


@dataclass
class Observed:
    """What is seen of a call. Others find it as `observed` in the scope, and note what they know."""

    problem: str | None = None
    status: int = NO_ANSWER
    sent_bytes: int = 0
    is_timed: bool = True

    def see(self, message: Message) -> None:
        """Take in a part of the answer."""
        if message["type"] == "http.response.start":
            headers = Headers(raw=message.get("headers", []))
            self.status = message["status"]
            is_stream = headers.get("content-type", "").startswith("text/event-stream")
            self.is_timed = not (is_stream or "preference-applied" in headers)
        elif message["type"] == "http.response.body":
            self.sent_bytes += len(message.get("body", b""))


class Observation:
    """Stands around everything but what gives a call its id."""

    def __init__(self, app: ASGIApp, routes: Sequence[APIRoute], level: int) -> None:
        """`level` is that of the lines in the log."""
        self.app = app
        self.routes = routes
        self.level = level

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state: ApiState = scope["app"].state.api
        observed = scope["observed"] = Observed()
        span = state.tracing.begin(scope) if state.tracing and scope["path"] not in UNLOGGED else None
        begun = time.perf_counter()

        async def send_seen(message: Message) -> None:
            observed.see(message)
            await send(message)

        ids = {"request_id": scope["request_id"], "traceparent": span.traceparent if span else None}
        with Bound(**ids), state.metrics.http.in_flight.track_inprogress():
            try:
                await self.app(scope, receive, send_seen)
            except Exception:
                # Answered further out, where faults are.
                observed.status, observed.problem = 500, InternalError.code
                raise
            finally:
                seconds = time.perf_counter() - begun
                fields = self._fields(scope, observed, seconds)
                is_timed = observed.is_timed and fields["route"] not in UNTIMED
                state.metrics.http.answered(fields, seconds if is_timed else None, observed.problem)
                self._log(scope, fields)
                if span is not None:
                    span.end(fields, observed.problem)

    def _fields(self, scope: Scope, observed: Observed, seconds: float) -> dict[str, Any]:
        # The path without the query, in which clients put what no log should keep.
        return {
            "method": scope["method"],
            "route": self._template(scope),
            "path": scope["path"],
            "status": observed.status,
            "seconds": round(seconds, 6),
            "bytes": observed.sent_bytes,
        }

    def _log(self, scope: Scope, fields: dict[str, Any]) -> None:
        if fields["route"] in UNLOGGED or not log.isEnabledFor(self.level):
            return
        principal: Principal | None = scope.get("principal")
        with Bound(tenant=principal.tenant if principal else None):
            text = "%(method)s %(path)s %(status)d in %(seconds).4f s, %(bytes)d bytes"
            log.log(self.level, text, fields, extra=fields)

    def _template(self, scope: Scope) -> str:
        """The route that a call was for, whether it came that far or was refused before."""
        route = scope.get("route")
        if isinstance(route, APIRoute):
            return route.path
        return next((r.path for r in self.routes if r.path_regex.match(scope["path"])), UNMATCHED)
