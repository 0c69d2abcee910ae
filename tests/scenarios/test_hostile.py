"""Clients that mean harm, over plain sockets: none keeps the service from answering others, or makes it crash."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.api.connections import MAX_HEAD_BYTES
from tests.conftest import SEED, StartServer
from tests.scenarios.conftest import NewModel
from tests.server import Server, body

MIB = 1 << 20
HEAD_S, BODY_S, UNREAD_S = 1.0, 1.0, 2.0


@pytest.fixture
def impatient(start_server: StartServer) -> Server:
    """A server that soon loses patience."""
    return start_server(head_timeout_s=HEAD_S, body_timeout_s=BODY_S, unread_timeout_s=UNREAD_S)


class Wire(socket.socket):
    """A connection on which anything may be sent."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.settimeout(30)
        self.connect(("127.0.0.1", server.client.base_url.port or 80))

    def ask(self, *parts: bytes) -> bytes:
        """All that comes back until the server hangs up."""
        for part in parts:
            self.sendall(part)
        return self.rest()

    def rest(self) -> bytes:
        """What comes until the end."""
        found = bytearray()
        try:
            while piece := self.recv(1 << 16):
                found += piece
        except ConnectionResetError:
            pass
        return bytes(found)


def problem_in(answer: bytes, status: int, code: str) -> None:
    """The one answer is this problem."""
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer
    assert b"application/problem+json" in head
    assert json.loads(content)["code"] == code


def statuses(answer: bytes) -> list[int]:
    """Of all answers in a row."""
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def head(method: str, target: str, *headers: str) -> bytes:
    """The head of a call."""
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def is_alive(server: Server) -> bool:
    """Whether others still get answers."""
    return server.client.get("/healthz", timeout=30).status_code == 200


# --- slow ones ---


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_does_not_end_is_waited_for_only_so_long(impatient: Server, sent: bytes) -> None:
    with Wire(impatient) as wire:
        problem_in(wire.ask(sent), 408, "head_too_slow")


def test_a_head_that_trickles_is_waited_for_no_longer(impatient: Server) -> None:
    with Wire(impatient) as wire:
        wire.sendall(head("GET", "/healthz")[:-2])
        wire.settimeout(0.1)
        answer = b""
        begun = time.monotonic()
        while not answer and time.monotonic() - begun < 30:
            try:
                wire.sendall(b"X-A: b\r\n")
                answer = wire.recv(1 << 16)
            except TimeoutError:
                continue
        problem_in(answer, 408, "head_too_slow")


def test_the_second_head_on_a_connection_has_to_end_as_well(impatient: Server) -> None:
    with Wire(impatient) as wire:
        answer = wire.ask(head("GET", "/healthz"), b"GET /hea")
    assert statuses(answer) == [200, 408]


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/plans", "/v1/tensors:quantize"])
def test_a_body_that_does_not_come_is_waited_for_only_so_long(impatient: Server, path: str) -> None:
    media_type = "application/vnd.apache.arrow.stream" if "tensors" in path else "application/json"
    with Wire(impatient) as wire:
        asked = head("POST", path, f"Content-Type: {media_type}", "Content-Length: 99")
        problem_in(wire.ask(asked, b"{"), 408, "body_too_slow")


def test_a_body_that_nobody_asked_for_does_not_hold_a_connection(impatient: Server) -> None:
    with Wire(impatient) as wire:
        answer = wire.ask(head("GET", "/healthz", "Transfer-Encoding: chunked"), b"5\r\nhel")
    assert statuses(answer) == [200]


def test_a_download_that_nobody_reads_is_cut_off(impatient: Server, new_model: NewModel) -> None:
    source = new_model({"a.weight": np.ones((2048, 4096), np.float32)})
    job = impatient.run(body(source, "parquet", skip=["*"]))
    path = max(impatient.artifacts(job["id"]), key=lambda entry: entry["size_bytes"])["path"]
    baseline = impatient.anonymous_bytes()
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(impatient)) for _ in range(20)]
        for wire in wires:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.sendall(head("GET", f"/v1/jobs/{job['id']}/artifacts/{path}"))
        received = [len(wire.recv(1)) for wire in wires]
        assert received == [1] * 20
        grown = impatient.anonymous_bytes() - baseline
        print(f"{grown / MIB:.1f} MiB for {len(wires)} downloads that nobody reads")
        assert grown < 20 * 4 * MIB
        deadline = time.monotonic() + 60
        while any(path.name.endswith(".parquet") for path in _open_paths(impatient)):
            assert time.monotonic() < deadline, "the file is still open"
            time.sleep(0.1)
        assert is_alive(impatient)


def _open_paths(server: Server) -> Iterator[Path]:
    for link in Path(f"/proc/{server.pid}/fd").iterdir():
        try:
            yield link.readlink()
        except FileNotFoundError:
            continue


def test_half_open_connections_leave_room_for_others_up_to_a_limit(start_server: StartServer) -> None:
    server = start_server(max_connections=1100)
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(Wire(server)).sendall(b"GET /healthz HTTP/1.1\r\nHost: ")
        with Wire(server) as one_more:
            assert statuses(one_more.ask(head("GET", "/healthz", "Connection: close"))) == [200]
        more = [stack.enter_context(Wire(server)) for _ in range(120)]
        refused = [wire for wire in more[-10:] if wire.recv(1 << 16).startswith(b"HTTP/1.1 503 ")]
        assert len(refused) == 10
    with Wire(server) as wire:
        wait_for(lambda: server.open_files() < 200)
        assert statuses(wire.ask(head("GET", "/healthz", "Connection: close"))) == [200]


def wait_for(holds: Any) -> None:
    """Until a condition holds."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it does not come to be"
        time.sleep(0.05)


# --- large and malformed ones ---


@pytest.mark.parametrize(
    "asked",
    [
        head("GET", "/healthz", "X-A: " + "a" * (1 << 20)),
        head("GET", "/healthz", *(f"X-{i}: a" for i in range(100_000))),
        head("GET", "/v1/jobs?label=" + "a" * (1 << 20)),
        head("GET", "/" + "a" * (1 << 20)),
        b"A" * (1 << 20),
    ],
    ids=["a header", "many headers", "a query", "a path", "no line at all"],
)
def test_a_head_beyond_all_measure_is_refused(server: Server, asked: bytes) -> None:
    with Wire(server) as wire:
        with suppress(BrokenPipeError, ConnectionResetError):
            wire.sendall(asked)
        answer = wire.rest()
    if answer:  # else the refusal was overtaken by the end of the connection
        problem_in(answer, 431, "head_too_large")
    assert is_alive(server)


def test_the_limit_of_a_head_is_the_same_however_it_comes(server: Server) -> None:
    def asked(value: str) -> bytes:
        return head("GET", "/healthz", f"X-A:{value}", "Connection: close")

    room = MAX_HEAD_BYTES - len(asked(""))
    for value, status in (("a" * room, 200), ("a" * (room + 1), 431), (" " * room + "a", 431), ("a" * 40_000, 431)):
        call = asked(value)
        for parts in ((call,), (call[:100], call[100:]), (head("GET", "/healthz") + call,)):
            with Wire(server) as wire:
                answer = wire.ask(*parts)
            assert statuses(answer)[-1] == status
            assert status == 200 or b"head_too_large" in answer


@pytest.mark.parametrize(
    "asked",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        head("GET", "/", "A\x00: b"),
        head("GET", "/", "A: b\x00c"),
        head("GET", "/", "A : b"),
        b"GET / HTTP/1.1\r\n\r\n",
        head("GET", "/", "Host: y"),
        head("POST", "/v1/jobs", "Content-Length: 5", "Content-Length: 6"),
        head("POST", "/v1/jobs", "Content-Length: -5"),
        head("POST", "/v1/jobs", "Content-Length: 0x5"),
        head("POST", "/v1/jobs", "Content-Length: +5"),
        head("POST", "/v1/jobs", "Transfer-Encoding: gzip, chunked"),
        head("POST", "/v1/jobs", "Transfer-Encoding: chunked, chunked"),
        head("POST", "/v1/jobs", "Transfer-Encoding: xchunked"),
    ],
)
def test_what_is_not_http_is_refused_and_the_connection_ends(server: Server, asked: bytes) -> None:
    with Wire(server) as wire:
        answer = wire.ask(asked)
    assert len(statuses(answer)) == 1, answer
    problem_in(answer, 400, "malformed_request")


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        (f"Content-Length: {len(SMUGGLED) + 5}", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", f"Content-Length: {len(SMUGGLED) + 5}"),
        (f"Content-Length: {len(SMUGGLED)}, 5",),
    ],
)
def test_a_call_with_two_lengths_is_never_read_in_two_ways(server: Server, headers: tuple[str, ...]) -> None:
    with Wire(server) as wire:
        wire.settimeout(8)
        answer = wire.ask(head("POST", "/v1/jobs", "Content-Type: application/json", *headers), b"0\r\n\r\n" + SMUGGLED)
    assert len(statuses(answer)) == 1
    problem_in(answer, 400, "malformed_request")


@pytest.mark.parametrize(
    "chunk", [b"zz\r\n", b"-1\r\n", b"0x5\r\nhello", b"5\r\nhelloXX", b"f" * 40 + b"\r\n", b"5;" + b"a" * 99_999]
)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_chunk_that_is_none_ends_the_connection_without_a_crash(server: Server, method: str, chunk: bytes) -> None:
    with Wire(server) as wire:
        asked = head(method, "/v1/jobs", "Content-Type: application/json", "Transfer-Encoding: chunked")
        try:
            answer = wire.ask(asked, b"1\r\n{\r\n", chunk)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    assert not [status for status in statuses(answer) if status >= 500], answer
    assert is_alive(server)


def test_http_1_0_and_pipelined_calls_are_answered_in_order(server: Server) -> None:
    with Wire(server) as wire:
        assert statuses(wire.ask(b"GET /healthz HTTP/1.0\r\n\r\n")) == [200]
    with Wire(server) as wire:
        calls = [head("GET", path) for path in ("/healthz", "/nothing", "/v1/schemes", "/v1/jobs/job_none")]
        last = head("GET", "/healthz", "Connection: close")
        assert statuses(wire.ask(b"".join(calls) + last)) == [200, 404, 200, 404, 200]


def test_a_body_is_asked_for_only_where_it_will_be_read(server: Server) -> None:
    asked = json.dumps({"kind": "x"}).encode()
    with Wire(server) as wire:
        wire.sendall(
            head(
                "POST",
                "/v1/jobs",
                "Content-Type: application/json",
                f"Content-Length: {len(asked)}",
                "Expect: 100-continue",
                "Connection: close",
            )
        )
        assert wire.recv(1 << 10).startswith(b"HTTP/1.1 100 ")
        assert statuses(wire.ask(asked)) == [422]
    with Wire(server) as wire:
        answer = wire.ask(head("POST", "/v1/jobs", f"Content-Length: {1 << 40}", "Expect: 100-continue"))
        assert statuses(answer) == [413]


def test_a_call_cut_at_any_byte_leaves_no_trace_but_its_line(server: Server, new_model: NewModel) -> None:
    print(f"TEST_SEED={SEED}")
    rng = random.Random(SEED)
    asked = json.dumps(body(new_model(layers=1), "parquet")).encode()
    whole = head("POST", "/v1/plans", "Content-Type: application/json", f"Content-Length: {len(asked)}") + asked
    for _ in range(40):
        with Wire(server) as wire:
            wire.sendall(whole[: rng.randrange(len(whole))])
            if rng.random() < 0.5:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset instead of an end
    assert is_alive(server)


def test_every_address_takes_head_and_options_without_a_fault(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    for template in document["paths"]:
        path = re.sub(r"\{[^}]*\}", "x", template)
        options = server.client.options(path)
        assert (options.status_code, "allow" in options.headers) == (405, True), path
        assert server.client.head(path).status_code < 500, path
        for method in ("TRACE", "CONNECT", "PROPFIND", "X" * 500):
            assert 400 <= server.client.request(method, path).status_code < 500, (method, path)
    assert is_alive(server)


# --- JSON ---


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"kind": "quantize", "timeout_s": NaN}',
        '{"kind": "quantize", "timeout_s": 1e999}',
        '{"kind": "quantize", "priority": ' + "9" * 10_000 + "}",
        '{"kind": "quantize", "timeout_s": 1' + "0" * 400 + "}",
        '{"kind": "quantize", "source": {"type": "uri", "uri": "file:///\\ud800"}, "outputs": [{"format": "parquet"}]}',
        '{"kind": "quantize", "labels": {"\\u0000": "\\u0000"}}',
        '{"kind": "x", "kind": "quantize"}',
        '"' + "\\u0041" * 10_000 + '"',
        b'\xff\xfe{"kind"',
        b'\xef\xbb\xbf{"kind": "x"}',
        "nul",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/plans", "/v1/batches"])
def test_json_that_is_meant_to_harm_is_refused(server: Server, path: str, content: str | bytes) -> None:
    response = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.content) < 20_000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, -1, 0, "1", True, [], {}])
def test_numbers_that_are_none_are_refused(server: Server, new_model: NewModel, value: Any) -> None:
    asked = json.dumps(body(new_model(layers=1), "parquet") | {"timeout_s": value})
    response = server.client.post("/v1/plans", content=asked, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text
