"""The header Host on loopback without keys: a page whose name was led here reads and cancels nothing."""

from __future__ import annotations

import socket

import pytest

from service.errors import InvalidConfig
from service.settings import load_settings
from tests.conftest import StartServer
from tests.server import Server


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "localhost.:8000", "127.0.0.1", "127.8.9.10:8000", "[::1]", "[::1]:8000"]
)
def test_a_call_names_this_machine(server: Server, host: str) -> None:
    assert server.client.get("/v1/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.test", "evil.test:8000", "localhost.evil.test", "127.0.0.1.evil.test", "evil.test:80:localhost", "[::]",
        "10.0.0.1", "0.0.0.0", "[fe80::1]", "::1", "[localhost]", "localhost:x", "localhost@evil.test", "", "x" * 5000,
    ],
)  # fmt: skip
def test_a_call_for_another_host_does_nothing(server: Server, host: str) -> None:
    for method, path in (("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("DELETE", "/v1/jobs/job_x"), ("GET", "/healthz")):
        response = server.client.request(method, path, headers={"Host": host}, json={} if method == "POST" else None)
        assert (response.status_code, response.json()["code"]) == (421, "host_not_allowed"), (method, path)
        assert "ARROWQUANT_ALLOWED_HOSTS" in response.json()["detail"]
        assert len(response.content) < 2000


def test_a_call_of_http_1_0_may_leave_its_host_out(server: Server) -> None:
    for sent, status in ((b"", b"200"), (b"Host: evil.test\r\n", b"421")):
        with socket.create_connection(("127.0.0.1", server.client.base_url.port or 80), 30) as wire:
            wire.sendall(b"GET /v1/jobs HTTP/1.0\r\n" + sent + b"\r\n")
            assert wire.recv(1 << 16).split(b" ")[1] == status


def test_an_operator_allows_other_hosts(start_server: StartServer) -> None:
    server = start_server(allowed_hosts="Quant.test, proxy.test")
    for host, status in (("quant.test", 200), ("PROXY.test:8443", 200), ("localhost", 200), ("other.test", 421)):
        assert server.client.get("/v1/jobs", headers={"Host": host}).status_code == status


def test_where_keys_are_asked_for_or_others_may_call_any_host_will_do(start_server: StartServer) -> None:
    for settings, status in (({"require_keys": True}, 401), ({"host": "0.0.0.0", "allow_unauthenticated": True}, 200)):
        server = start_server(**settings)
        assert server.client.get("/v1/jobs", headers={"Host": "quant.test"}).status_code == status


@pytest.mark.parametrize("host", ["http://quant.test", "quant.test:8000", "*", "", "a b"])
def test_an_allowed_host_is_a_name_alone(host: str) -> None:
    with pytest.raises(InvalidConfig, match="ARROWQUANT_ALLOWED_HOSTS"):
        load_settings(allowed_hosts=(host,))


def test_an_address_with_a_slash_too_many_is_nothing(server: Server) -> None:
    for method, path in (("GET", "/v1/jobs/"), ("POST", "/v1/gc/"), ("GET", "/healthz/")):
        response = server.client.request(method, path)
        assert (response.status_code, response.json()["code"]) == (404, "not_found")
