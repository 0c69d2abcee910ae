"""Asks each call for its key, before anything of it is read: 401 without one, 403 without its scope, 429 too often."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import Principal, is_open, scope_for
from service.api.early import EarlyReply
from service.api.key_ring import HOLD_S, KeyRing
from service.api.problems import respond
from service.api.rate_limits import Quota, RateLimits
from service.errors import ArrowQuantError, ForbiddenScope, NotReady, RateLimited, Unauthorized
from service.jobs.api_keys import ApiKey
from service.jobs.api_keys import Scope as KeyScope
from service.jobs.quotas import Limits

#: What a call is refused for here; anything else is a fault, and answered as such.
_REFUSALS = (Unauthorized, ForbiddenScope, RateLimited, NotReady)
REALM = 'Bearer realm="arrowquant"'


class Authentication:
    """Lets in who has a key, and nobody too often. A stream ends when its key does."""

    def __init__(self, app: ASGIApp, keys: KeyRing, defaults: Limits) -> None:
        """`defaults` hold for tenants without limits of their own."""
        self.app = app
        self.keys = keys
        self.defaults = defaults
        self._rates = RateLimits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http" or is_open(scope["path"]):
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        headers: dict[str, str] = {}
        try:
            text = _key_in(request)
            scope["principal"] = await self._admit(request, text, headers)
        except _REFUSALS as error:
            reply = respond(error, request, headers | _challenge(error, request))
            await (EarlyReply(reply) if _has_body(request) else reply)(scope, receive, send)
            return
        await self.app(scope, receive, _Watched(self.keys, text, headers, send))

    async def _admit(self, request: Request, text: str, headers: dict[str, str]) -> Principal:
        """Who calls; fills in the headers that any answer to the call carries."""
        key, overrides = await self.keys.verify(text)
        found, wait_s = self._rates.take(_quotas(key, overrides.over(self.defaults)))
        headers |= found
        if wait_s:
            headers["Retry-After"] = str(math.ceil(wait_s))
            raise RateLimited(f"more calls came than RateLimit-Policy allows: the next may come in {wait_s:.2f} s")
        principal = Principal(key.tenant, key.scopes, key.id)
        principal.check_may(_scope_of(request))
        return principal


class _Watched:
    """Sends an answer with headers added, and cuts a stream off whose key has been revoked or has expired."""

    def __init__(self, keys: KeyRing, text: str, headers: dict[str, str], send: Send) -> None:
        self._keys = keys
        self._text = text
        self._headers = headers
        self._send = send
        self._next_look = math.inf
        self._is_cut = False

    async def __call__(self, message: Message) -> None:
        """See the ASGI specification."""
        if self._is_cut:
            return
        if message["type"] == "http.response.start":
            is_endless = "content-length" not in Headers(raw=message.get("headers", []))
            self._next_look = time.monotonic() + HOLD_S if is_endless else math.inf
            MutableHeaders(scope=message).update(self._headers)
        elif time.monotonic() >= self._next_look and not await self._is_let_in():
            # The server now tells `receive` that the client is gone, at which a stream stops.
            self._is_cut = True
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _is_let_in(self) -> bool:
        self._next_look = time.monotonic() + HOLD_S
        try:
            await self._keys.verify(self._text)
        except Unauthorized:
            return False
        return True


def _key_in(request: Request) -> str:
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        raise Unauthorized("send a key: `Authorization: Bearer <key>`; the operator makes one with `arrowquant keys`")
    return text.strip()


def _quotas(key: ApiKey, limits: Limits) -> Iterator[Quota]:
    if limits.requests_per_minute is not None:
        yield Quota("tenant", key.tenant, limits.requests_per_minute)
    if key.requests_per_minute is not None:
        yield Quota("key", key.id, key.requests_per_minute)


def _challenge(error: ArrowQuantError, request: Request) -> dict[str, str]:
    """RFC 6750: a call without a key is not told of an error, others are."""
    match error:
        case ForbiddenScope():
            return {"WWW-Authenticate": f'{REALM}, error="insufficient_scope", scope="{_scope_of(request)}"'}
        case Unauthorized() if "authorization" in request.headers:
            return {"WWW-Authenticate": f'{REALM}, error="invalid_token"'}
        case Unauthorized():
            return {"WWW-Authenticate": REALM}
    return {}


def _scope_of(request: Request) -> KeyScope:
    # The path that the router sees; `request.url` is put together with the client's own Host header.
    return scope_for(request.method, request.scope["path"])


def _has_body(request: Request) -> bool:
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"
