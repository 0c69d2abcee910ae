"""Every error is a problem object, whoever raised it."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from service import errors
from service.api.app import create_app
from service.api.problem_codes import CODES
from service.api.problems import STATUS, status_of
from service.settings import Settings
from tests.server import Server, body

HALF_A_CALL = (
    b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
)


def problem_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem object, its form checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["code"] == code
    assert problem["status"] == status
    assert problem["type"] == f"/problems/{code}"
    assert problem["title"]
    assert problem["detail"]
    return problem


def post(server: Server, content: str | bytes, media_type: str = "application/json") -> httpx.Response:
    return server.client.post("/v1/jobs", content=content, headers={"Content-Type": media_type})


def test_an_address_that_does_not_exist_is_a_problem(server: Server) -> None:
    problem = problem_of(server.client.get("/v2/nothing"), 404, "not_found")
    assert problem["instance"] == "/v2/nothing"


def test_a_method_that_is_not_taken_names_those_that_are(server: Server) -> None:
    response = server.client.put("/v1/jobs")
    problem_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET, HEAD, POST"


def test_a_body_that_is_not_json_is_a_problem(server: Server) -> None:
    problem = problem_of(post(server, '{"kind": "quantize",'), 400, "malformed_body")
    assert "character" in problem["detail"]


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"kind": "quantize", "priority": ' + "9" * 5000 + "}", b"\xff\xfe\x00"]
)
def test_json_that_is_meant_to_break_the_parser_is_a_problem(server: Server, content: str | bytes) -> None:
    response = post(server, content)
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"


def test_a_body_of_another_type_is_a_problem(server: Server) -> None:
    problem = problem_of(post(server, "{}", "text/plain"), 415, "unsupported_media_type")
    assert "application/json" in problem["detail"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server: Server) -> None:
    problem_of(post(server, b" " * ((1 << 20) + 1)), 413, "body_too_large")


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(server: Server) -> None:
    response = server.client.post(
        "/v1/jobs", content=(b" " * (1 << 16) for _ in range(32)), headers={"Content-Type": "application/json"}
    )
    problem_of(response, 413, "body_too_large")


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"colour": "red"}, "/colour"),
        ({"config": {"bit_width": 1}}, "/config/bit_width"),
        ({"config": {"bit_width": 9}}, "/config/bit_width"),
        ({"config": {"group_size": 17}}, "/config/group_size"),
        ({"config": {"layers": [{"match": "*", "bits": 4}]}}, "/config/layers/0/bits"),
        ({"profile": "moon"}, "/profile"),
        ({"kind": "paint"}, "/kind"),
        ({"kind": None}, "/kind"),
        ({"source": {"type": "uri"}}, "/source/uri"),
        ({"source": {"type": "ftp"}}, "/source/type"),
        ({"outputs": []}, "/outputs"),
        ({"outputs": [{"format": "parquet", "config": {"method": "guess"}}]}, "/outputs/0/config/method"),
        ({"outputs": [{"format": "parquet"}, {"format": "vhs"}]}, "/outputs/1/format"),
        ({"outputs": [{"format": "parquet", "options": {"speed": 3}}]}, "/outputs/0/options/speed"),
    ],
)
def test_a_wrong_field_is_named_by_a_pointer(server: Server, model: Path, change: dict[str, Any], pointer: str) -> None:
    asked = {k: v for k, v in (body(model, "parquet") | change).items() if v is not None}
    response = server.client.post("/v1/jobs", json=asked)
    assert response.status_code == 422, response.text
    assert [e["pointer"] for e in response.json()["errors"]] == [pointer]


def test_a_missing_field_is_named_by_a_pointer(server: Server) -> None:
    problem = problem_of(post(server, '{"kind": "quantize"}'), 422, "invalid_request")
    assert {e["pointer"] for e in problem["errors"]} == {"/source", "/outputs"}


def test_a_wrong_parameter_is_named(server: Server) -> None:
    problem = problem_of(server.client.get("/v1/jobs", params={"limit": 201}), 422, "invalid_request")
    assert problem["errors"][0]["parameter"] == "limit"


@pytest.mark.parametrize("path", ["/etc", "/etc/no-such-thing"])
def test_a_path_outside_the_roots_is_forbidden_whatever_lies_there(server: Server, path: str) -> None:
    problem_of(server.client.post("/v1/jobs", json=body(Path(path), "parquet")), 403, "path_forbidden")


def test_a_model_that_is_not_there_is_a_problem(server: Server, model_root: Path) -> None:
    problem_of(server.client.post("/v1/jobs", json=body(model_root / "none", "parquet")), 404, "model_not_found")


def test_every_code_has_a_page_that_explains_it(server: Server) -> None:
    for code in CODES:
        response = server.client.get(f"/problems/{code}")
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert code in response.text
    assert "<code>safetensors.torch.save_file" in server.client.get("/problems/pickled_weights").text
    problem_of(server.client.get("/problems/unheard_of"), 404, "not_found")


def test_every_class_of_the_table_is_used() -> None:
    assert {status_of(cls) for cls in CODES.values()} <= set(STATUS.values())
    assert all(any(issubclass(cls, known) for cls in CODES.values()) for known in STATUS)


def test_every_error_that_is_documented_can_occur() -> None:
    root = Path(errors.__file__).parent
    sources = [p.read_text() for p in root.rglob("*.py") if p.name not in ("errors.py", "http_errors.py")]
    used = re.compile(r"\b(?:errors\.)?([A-Z][A-Za-z]+)\b(?!: \d)")  # a line of the table of statuses is no use
    names = {name for text in sources for name in used.findall(text)}
    assert [cls.__name__ for cls in CODES.values() if cls.__name__ not in names] == []


def test_a_crash_shows_an_id_that_the_log_has_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(data_dir=tmp_path / "data"))

    @app.get("/crash")
    async def crash() -> None:
        raise RuntimeError("/secret/path")

    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        response = client.get("/crash", headers={"X-Request-ID": "my-id"})
    problem = problem_of(response, 500, "internal_error")
    assert "my-id" in problem["detail"]
    assert response.headers["connection"] == "close"
    assert "secret" not in response.text
    assert any("my-id" in record.getMessage() for record in caplog.records)


def test_the_id_of_a_call_is_the_clients_or_a_new_one(server: Server) -> None:
    assert server.client.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert server.client.get("/healthz", headers={"X-Request-ID": "no good"}).headers["x-request-id"].startswith("req_")


def test_nothing_is_answered_that_a_browser_might_run(server: Server) -> None:
    headers = server.client.get("/problems/not_found").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("default-src 'none'")


def test_a_client_that_hangs_up_in_the_middle_leaves_no_trace_in_the_log(server: Server) -> None:
    url = httpx.URL(server.base_url)
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(HALF_A_CALL)
    assert server.client.get("/healthz").status_code == 200
    assert "Traceback" not in server.log


def test_problems_leave_out_what_is_not_there(server: Server) -> None:
    assert "null" not in json.dumps(server.client.get("/v1/jobs/job_none").json())
