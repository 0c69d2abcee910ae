"""Which addresses a webhook may have: rules for its text, and for the networks in which its host lies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING

from service.errors import WebhookRefused

if TYPE_CHECKING:
    import httpx

Network = IPv4Network | IPv6Network

#: All that an address may be written with; the rest has to be percent-encoded.
_CHARACTERS = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")
_MAX_NAME = 253
_DEFAULT_PORTS = {"http": 80, "https": 443}
#: Of other services, which could take a call for one of theirs; the list of browsers, above 1023.
_FORBIDDEN_PORTS = frozenset(
    (1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, *range(6665, 6670), 6679, 6697, 10080)
)

#: What IANA has set aside in IPv4: private, loopback, link-local, shared, documentation, multicast, reserved.
_SPECIAL_4 = [
    ip_network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/3",
        # Serves metadata to machines of Azure, out of a public network.
        "168.63.129.16/32",
    )
]  # fmt: skip
#: Of IPv6 only this is in use, and in it these are special: protocols and tunnels, documentation, 6to4.
_GLOBAL_6 = ip_network("2000::/3")
_SPECIAL_6 = [ip_network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]
#: Stands for the IPv4 address in its last four bytes.
_NAT64 = ip_network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Reach:
    """Where webhooks may go: the public internet over TLS, and what else is allowed."""

    networks: tuple[Network, ...] = ()
    allow_http: bool = False

    def check_addresses(self, host: str, addresses: Sequence[str]) -> None:
        """Raise WebhookRefused unless there are some and each may be called.

        Alike for what does not exist and what may not be called: a name in a private network tells nothing.
        """
        if not addresses or not all(self._allows(address) for address in addresses):
            raise WebhookRefused(
                f"{host} has no address now that this server may call, which are those of the public internet: check "
                "the name; the operator allows networks of their own with ARROWQUANT_WEBHOOK_ALLOWED_NETWORKS"
            )

    def _allows(self, text: str) -> bool:
        address = ip_address(text)
        return any(address in network for network in self.networks) or is_public(address)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address taken apart: `target` is path and query as they are sent, `authority` what the header Host says."""

    scheme: str
    host: str
    port: int
    target: bytes
    authority: str

    @property
    def place(self) -> str:
        """Who answers there, so that calls to one receiver can be counted."""
        return f"{self.host}:{self.port}"


def parse(url: str, reach: Reach) -> Endpoint:
    """What a webhook's address says; raises WebhookRefused when no webhook may have it, wherever it leads."""
    import httpx  # here, because most processes never see an address

    if not _CHARACTERS.fullmatch(url):
        raise WebhookRefused("the address holds characters that an address cannot hold: percent-encode them")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise WebhookRefused("this is no address: write https://host/path") from error
    _check_scheme(parsed, reach)
    if parsed.userinfo or "@" in url.partition("://")[2].partition("/")[0]:
        raise WebhookRefused("the address holds a name or password: take it out, the signature says who calls")
    if "#" in url:
        raise WebhookRefused("the address ends in a fragment (#…), which is never sent: leave it out")
    host = parsed.raw_host.decode("ascii").lower()
    if not _is_host(host):
        raise WebhookRefused(f"{host!r} is no host: give a name or an IP address")
    port = parsed.port if parsed.port is not None else _DEFAULT_PORTS[parsed.scheme]
    _check_port(port)
    return Endpoint(parsed.scheme, host, port, parsed.raw_path, parsed.netloc.decode("ascii"))


def place_of(url: str) -> str:
    """Who answers at an address that was accepted."""
    return parse(url, Reach(allow_http=True)).place


def shown(url: str) -> str:
    """An address as it is answered and logged: a query often holds a password."""
    base, question_mark, _ = url.partition("?")
    return f"{base}?…" if question_mark else base


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is in the public internet, itself or as an IPv4 address that it stands for."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
        return address in _GLOBAL_6 and not any(address in network for network in _SPECIAL_6)
    return not any(address in network for network in _SPECIAL_4)


def _check_scheme(url: httpx.URL, reach: Reach) -> None:
    if url.scheme == "https" or (url.scheme == "http" and reach.allow_http):
        return
    hint = "; the operator allows http:// with ARROWQUANT_WEBHOOK_ALLOW_HTTP=true" if url.scheme == "http" else ""
    raise WebhookRefused(f"the address begins with {url.scheme[:32]!r}: it has to be https://{hint}")


def _check_port(port: int) -> None:
    if port not in (80, 443) and (not 1024 <= port <= 65535 or port in _FORBIDDEN_PORTS):
        raise WebhookRefused(f"port {port} is none, or of another service: take 443, or one above 1023")


def _is_host(host: str) -> bool:
    if ":" in host:
        try:
            return isinstance(ip_address(host), IPv6Address) and "%" not in host
        except ValueError:
            return False
    return len(host) <= _MAX_NAME and _NAME.fullmatch(host) is not None
