"""What a call is for, as its first line says it: a path, a whole address, or the server itself (RFC 9112, 3.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.early import EarlyReply
from service.api.http_errors import MalformedRequest, MethodNotAllowed
from service.api.problems import respond

_WHOLE = re.compile(rb"https?://([^/@]+)(/.*)?", re.IGNORECASE | re.DOTALL)


class Target:
    """Leaves every call with a path: of a whole address its own, and its host in place of the header's.

    `OPTIONS *` is answered here, with all methods that there are; this server is nobody's proxy, so `CONNECT` is 405.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[APIRoute]) -> None:
        self.app = app
        self.methods = sorted({method for route in routes for method in route.methods or ()} | {"HEAD", "OPTIONS"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http" or scope["raw_path"].startswith(b"/"):
            await self.app(scope, receive, send)
        elif scope["method"] != "CONNECT" and (whole := _WHOLE.fullmatch(scope["raw_path"])):
            # In place, so that those further out see the path as well.
            scope.update(_reduced(scope, whole[1], whole[2] or b"/"))
            await self.app(scope, receive, send)
        else:
            await self._answer(Request(scope))(scope, receive, send)

    def _answer(self, request: Request) -> Response:
        match request.method, request.scope["raw_path"]:
            case "OPTIONS", b"*":
                return Response(None, 204, {"Allow": ", ".join(self.methods)})
            case "CONNECT", _:
                error = MethodNotAllowed("this server makes no connections for others")
                return EarlyReply(respond(error, request, {"Allow": ""}))
        return EarlyReply(respond(MalformedRequest("the call is for neither a path nor a whole http address"), request))


def _reduced(scope: Scope, host: bytes, raw_path: bytes) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    return {
        "path": unquote(raw_path.decode("ascii")),
        "raw_path": raw_path,
        "headers": [(b"host", host), *headers],
    }
