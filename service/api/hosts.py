"""Which names a call may have for this server, where nothing but the way to it keeps strangers out.

A page of anybody's can have its own name lead to 127.0.0.1 (DNS rebinding), and the browser then takes this server for
the page's own. The name is still in the header Host.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.early import EarlyReply
from service.api.http_errors import HostNotAllowed
from service.api.problems import respond

_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:]+))(?::[0-9]*)?")
#: Of a name, in what is answered and logged.
SHOWN = 100


class Hosts:
    """Answers 421 to a call whose Host is neither of this machine's own nor allowed."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        """`allowed` are names without ports, in lower case, beside `localhost` and the loopback addresses."""
        self.app = app
        self.allowed = frozenset(("localhost", *allowed))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        # HTTP/1.0 may leave it out, and no browser does.
        host = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        if host is None or self._allows(host):
            await self.app(scope, receive, send)
            return
        error = HostNotAllowed(
            f"the call is for {host[:SHOWN]!r}, and without keys this server answers to localhost, 127.0.0.0/8 and "
            "[::1] alone: where that name is meant, the operator adds it to ARROWQUANT_ALLOWED_HOSTS"
        )
        await EarlyReply(respond(error, Request(scope)))(scope, receive, send)

    def _allows(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = (found["ipv6"] or found["name"]).lower().removesuffix(".")
        return name in self.allowed or _is_loopback(name)


def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
