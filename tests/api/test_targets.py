"""The forms that the target of a call may have, on a server that asks for keys and on one that does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPResponse

import pytest

from tests.api.keyed import Keyed
from tests.server import Server


class Caller:
    """Calls a server with targets that clients of a higher kind would not send."""

    def __init__(self, server: Server, key: str | None = None) -> None:
        self.server = server
        self.address = f"127.0.0.1:{server.client.base_url.port}"
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def ask(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, content: bytes | None = None
    ) -> tuple[HTTPResponse, bytes]:
        """The answer and its body; nothing of it was a fault."""
        connection = HTTPConnection(self.address, timeout=30)
        connection.request(method, target, content, self.headers | dict(headers or {}))
        response = connection.getresponse()
        found = response, response.read()
        connection.close()
        assert "Traceback" not in self.server.log, self.server.log_end
        return found


@pytest.fixture(params=["without keys", "with keys"])
def caller(request: pytest.FixtureRequest, server: Server, keyed: Keyed) -> Caller:
    """Calls of somebody whom the server lets in."""
    if request.param == "without keys":
        return Caller(server)
    return Caller(keyed.server, keyed.client("targets").text)


def problem_in(answer: tuple[HTTPResponse, bytes], status: int) -> str:
    """Its code."""
    response, content = answer
    assert response.status == status, content
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    return str(json.loads(content)["code"])


@pytest.mark.parametrize("scheme", ["http", "HTTPS"])
def test_a_whole_address_is_answered_as_its_path(caller: Caller, scheme: str) -> None:
    whole = f"{scheme}://{caller.address}"
    response, content = caller.ask("GET", f"{whole}/v1/jobs?limit=1")
    assert response.status == 200, content
    assert "data" in json.loads(content)
    assert problem_in(caller.ask("GET", f"{whole}/v1/jobs?limit=0"), 422) == "invalid_request"
    assert problem_in(caller.ask("GET", f"{whole}/v1/jobs/job_n%6Fne"), 404) == "not_found"
    assert problem_in(caller.ask("GET", whole), 404) == "not_found"


def test_a_whole_address_takes_the_place_of_the_host_that_the_header_names(caller: Caller) -> None:
    response, content = caller.ask("GET", f"http://{caller.address}/healthz", {"Host": "elsewhere.example"})
    assert response.status == 200, content


def test_a_whole_address_opens_nothing_that_its_path_does_not(keyed: Keyed) -> None:
    caller = Caller(keyed.server)
    assert problem_in(caller.ask("GET", f"http://{caller.address}/v1/jobs"), 401) == "unauthorized"
    assert problem_in(caller.ask("GET", f"http://{caller.address}/metrics"), 401) == "unauthorized"


def test_options_of_the_whole_server_are_all_its_methods(caller: Caller) -> None:
    response, content = caller.ask("OPTIONS", "*")
    assert (response.status, content) == (204, b"")
    assert response.headers["allow"] == "DELETE, GET, HEAD, OPTIONS, POST, PUT"


def test_this_server_is_nobodys_proxy(caller: Caller) -> None:
    answer = caller.ask("CONNECT", "a:1")
    assert problem_in(answer, 405) == "method_not_allowed"
    assert answer[0].headers["allow"] == ""


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", "*"), ("GET", "v1/jobs"), ("GET", "%2Fv1/jobs"), ("GET", "ftp://x/v1/jobs"), ("GET", "http:///v1/jobs")],
)
def test_a_target_that_is_no_address_is_refused(caller: Caller, method: str, target: str) -> None:
    assert problem_in(caller.ask(method, target), 400) == "malformed_request"
    assert problem_in(caller.ask(method, target, content=b"x" * (4 << 20)), 400) == "malformed_request"


def test_a_host_that_is_none_does_no_harm(caller: Caller) -> None:
    response, content = caller.ask("GET", "/v1/nothing", {"Host": "["})
    assert response.status in (400, 404, 421), content
