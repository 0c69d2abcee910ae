"""One attempt to deliver: one connection, one POST, one status; never slower, larger or elsewhere than is allowed."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpcore
import httpx

from service import __version__
from service.errors import InvalidConfig, WebhookRefused
from service.jobs.webhooks.addresses import Reach, parse
from service.jobs.webhooks.delivery import Answer
from service.jobs.webhooks.resolver import Resolver

#: An answer's body means nothing; so much of it is read, for so long, that the receiver need not see a reset.
READ_BYTES = 64 << 10
READ_S = 1.0
#: Of a host that has many.
ADDRESSES_TRIED = 3


class Sender:
    """Sends signed messages; everything on the event loop."""

    def __init__(self, reach: Reach, resolver: Resolver, *, timeout_s: float, ca_file: Path | None = None) -> None:
        """`ca_file` holds certificates to trust beside the usual ones; raises InvalidConfig when it holds none."""
        self._reach = reach
        self._timeout_s = timeout_s
        self._resolver = resolver
        self._tls = httpx.create_ssl_context(trust_env=False)
        if ca_file is not None:
            try:
                self._tls.load_verify_locations(ca_file)
            except OSError as error:
                raise InvalidConfig(f"{ca_file} holds no certificates in PEM that can be read: {error}") from error

    async def send(self, url: str, headers: Mapping[str, str], body: bytes, tenant: str) -> Answer:
        """POST a tenant's message and see what the receiver says; raises nothing that the receiver could cause.

        Raises LookupsBusy when it was not even tried.
        """
        try:
            endpoint = parse(url, self._reach)
            addresses = await self._resolver.resolve(endpoint.host, endpoint.port, tenant)
            origin = httpcore.Origin(endpoint.scheme.encode(), endpoint.host.encode(), endpoint.port)
            address = httpcore.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=endpoint.target)
            request = httpcore.Request(
                "POST",
                address,
                headers=_headers(endpoint.authority, headers, body),
                content=body,
                extensions={"timeout": {"connect": self._timeout_s / ADDRESSES_TRIED}},
            )
            async with httpcore.AsyncHTTPConnection(
                origin, ssl_context=self._tls, network_backend=CheckedNetwork(addresses)
            ) as connection:
                async with asyncio.timeout(self._timeout_s):
                    response = await connection.handle_async_request(request)
                await _read_on(response)
                return _answer(response)
        except WebhookRefused as refused:
            return Answer(None, refused.detail)
        except (TimeoutError, httpcore.TimeoutException):
            return Answer(None, f"no answer within {self._timeout_s:g} s")
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            return Answer(None, _explain(error))


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to the very addresses that were checked: the name is looked up once, and not again in between."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - its addresses are known
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - it is httpcore's interface
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection; raises httpcore's errors when no address takes one."""
        *others, last = self._addresses[:ADDRESSES_TRIED]
        for address in others:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
        return await self._network.connect_tcp(last, port, timeout, local_address, socket_options)


def _headers(authority: str, given: Mapping[str, str], body: bytes) -> list[tuple[str, str]]:
    own = {
        "host": authority,
        "user-agent": f"arrowquant/{__version__}",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    return list((own | dict(given)).items())


async def _read_on(response: httpcore.Response) -> None:
    size = 0
    # The status has come: whatever happens to the rest changes nothing.
    with suppress(TimeoutError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError):
        async with asyncio.timeout(READ_S):
            async for piece in response.aiter_stream():
                size += len(piece)
                if size >= READ_BYTES:
                    return


def _answer(response: httpcore.Response) -> Answer:
    status = response.status
    if 200 <= status < 300:
        return Answer(status, None)
    hint = "; redirects are not followed" if 300 <= status < 400 else ""
    return Answer(status, f"the receiver answered {status}{hint}", _retry_after_s(response))


def _retry_after_s(response: httpcore.Response) -> float | None:
    """What 429 and 503 may ask for: seconds, or a date."""
    if response.status not in (429, 503):
        return None
    text = next((value for name, value in response.headers if name.lower() == b"retry-after"), b"").decode("latin-1")
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        date = parsedate_to_datetime(text)
        return (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError):
        return None


def _explain(error: Exception) -> str:
    """What failed, in words of ours: an error's own may quote the receiver."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the receiver's certificate is not trusted: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return "TLS could not be agreed on with the receiver"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpcore.ConnectError):
        return "the receiver takes no connections"
    if isinstance(error, httpcore.ProtocolError):
        return "the receiver did not answer in HTTP, or hung up without an answer"
    return "the connection broke"
