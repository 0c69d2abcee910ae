"""Which addresses are of the public internet, over all there are."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import WebhookRefused
from service.jobs.webhooks.addresses import Reach, is_public, parse

ADDRESSES = st.ip_addresses(v=4) | st.ip_addresses(v=6)


@given(ADDRESSES)
def test_nothing_is_public_that_the_standard_library_knows_to_be_special(address: IPv4Address | IPv6Address) -> None:
    """Hypothesis prefers addresses out of the special networks; the NAT64 prefix alone is special and may be called."""
    if is_public(address) and address not in ip_network("64:ff9b::/96"):
        assert address.is_global
        assert not any((address.is_multicast, address.is_reserved, address.is_unspecified))


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_public_in_no_other_clothes_than_nat64(address: IPv4Address) -> None:
    number = int(address)
    assert is_public(IPv6Address(int(IPv6Address("64:ff9b::")) | number)) == is_public(address)
    for prefix in ("::", "::ffff:0:0", "::ffff:0:0:0", "64:ff9b:1::", "fe80::5efe:0:0"):
        assert not is_public(IPv6Address(int(IPv6Address(prefix)) | number))
    assert not is_public(IPv6Address(0x2002 << 112 | number << 80)), "6to4"
    assert not is_public(IPv6Address(0x2001 << 112 | number)), "Teredo"


@pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700::1111", "2a00::1", "64:ff9b::808:808"])
def test_the_public_internet_is_public(text: str) -> None:
    assert is_public(ip_address(text))
    Reach().check_addresses("host", [text])


def test_one_address_that_may_not_be_called_is_enough() -> None:
    for addresses in ([], ["8.8.8.8", "10.0.0.1"], ["10.0.0.1", "8.8.8.8"]):
        with pytest.raises(WebhookRefused):
            Reach().check_addresses("host", addresses)
    own = Reach((ip_network("10.0.0.0/8"),))
    own.check_addresses("host", ["8.8.8.8", "10.0.0.1"])
    with pytest.raises(WebhookRefused):
        own.check_addresses("host", ["10.0.0.1", "::ffff:10.0.0.1"])


@given(st.text(max_size=60) | st.from_regex(r"https?://[ -~]{0,40}", fullmatch=True))
def test_whatever_text_comes_it_is_refused_or_an_address_on_one_line(text: str) -> None:
    try:
        endpoint = parse(text, Reach(allow_http=True))
    except WebhookRefused:
        return
    assert endpoint.scheme in ("http", "https")
    assert endpoint.target.startswith(b"/")
    assert endpoint.target.isascii()
    assert not set(endpoint.target.decode() + endpoint.authority) & set(" \r\n\t\x00")
    assert 0 < endpoint.port < 65536
    assert "@" not in endpoint.authority
