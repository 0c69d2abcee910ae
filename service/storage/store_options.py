"""What an operator says about stores; the credentials for them are where their own tools look for them."""

from __future__ import annotations

from dataclasses import dataclass

from service.storage.remote_address import RemoteAddress


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Which stores requests may name, and how they are reached."""

    roots: tuple[RemoteAddress, ...] = ()
    s3_endpoint: str | None = None
    s3_region: str | None = None
    gs_endpoint: str | None = None
    az_endpoint: str | None = None
    hub_endpoint: str | None = None
    #: Whether an endpoint may be spoken to without TLS.
    allow_http: bool = False
    #: How long a store may fail to answer, attempts included, before that is an error.
    timeout_s: float = 60.0
