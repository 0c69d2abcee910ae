"""Keys: who is let in, with what, for how long; and what a server without keys refuses to do."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute

from service.api.app import ROUTERS, create_app
from service.api.auth import ADMIN_PATHS, is_open, scope_for
from service.api.key_ring import HOLD_S
from service.api.openapi import build
from service.api.server import serve
from service.errors import InvalidConfig
from service.jobs.api_keys import ApiKeys, Scope
from service.jobs.store import DATABASE
from service.settings import Settings, load_settings
from tests.api.keyed import Client, Keyed
from tests.api.test_jobs import large_model
from tests.conftest import StartServer
from tests.server import Server, body

UNKNOWN = {"job_id": "job_0", "batch_id": "batch_0", "digest": "0" * 64, "code": "not_found", "path": "a/b"}
CALLS = sorted(
    {
        (method, route.path)
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods | ({"HEAD"} if "GET" in route.methods else set())
    }
)
OPEN = {("GET", path) for path in ("/healthz", "/readyz", "/problems/{code}")}
CLOSED = [call for call in CALLS if not is_open(call[1])]


def call(client: httpx.Client, method: str, path: str) -> httpx.Response:
    for name, value in UNKNOWN.items():
        path = path.replace(f"{{{name}:path}}", value).replace(f"{{{name}}}", value)
    assert "{" not in path, f"UNKNOWN needs an example for {path}"
    return client.request(method, path)


def code_of(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    return str(response.json()["code"])


def test_every_call_but_health_and_problem_pages_takes_a_key(keyed: Keyed) -> None:
    assert {c for c in CALLS if c[0] != "HEAD"} - set(CLOSED) == OPEN
    for method, path in CLOSED:
        response = call(keyed.anonymous, method, path)
        assert response.status_code == 401, (method, path)
        assert response.headers["www-authenticate"] == 'Bearer realm="arrowquant"'
        if method != "HEAD":
            assert code_of(response) == "unauthorized"
    for method, path in OPEN:
        assert call(keyed.anonymous, method, path).status_code == 200, (method, path)


@pytest.mark.parametrize("path", ["/", "/nothing", "/openapi.json", "/metrics", "/problems", "//healthz", "/healthz/"])
def test_an_address_that_no_route_serves_is_closed_as_well(keyed: Keyed, path: str) -> None:
    assert keyed.anonymous.get(path).status_code == 401


def test_looking_takes_read_and_all_else_submit(keyed: Keyed) -> None:
    reader, submitter = keyed.client("scopes", Scope.READ), keyed.client("scopes", Scope.SUBMIT)
    for method, path in CLOSED:
        looks = method in ("GET", "HEAD")
        scope = "admin" if path in ADMIN_PATHS else "read" if looks else "submit"
        for client, has in ((reader, "read"), (submitter, "submit")):
            response = call(client, method, path)
            assert (response.status_code == 403) == (has != scope), (method, path, has, response.text)
            if response.status_code == 403:
                expected = f'Bearer realm="arrowquant", error="insufficient_scope", scope="{scope}"'
                assert response.headers["www-authenticate"] == expected
                assert method == "HEAD" or code_of(response) == "forbidden_scope"


def test_metrics_take_the_scope_admin(keyed: Keyed) -> None:
    assert keyed.client("scopes", Scope.READ, Scope.SUBMIT).get("/metrics").status_code == 403
    assert keyed.client("scopes", Scope.ADMIN).get("/metrics").status_code in (200, 404)


@pytest.mark.parametrize("host", ["x/?", "x/#", "x\\", "x/a?b=", "[::1", "", "127.0.0.1/healthz?", "u@x/problems/a?"])
def test_a_host_header_opens_nothing(keyed: Keyed, host: str) -> None:
    reader = keyed.client("scopes", Scope.READ)
    assert keyed.anonymous.get("/v1/jobs", headers={"Host": host}).status_code in (400, 401)
    assert reader.get("/metrics", headers={"Host": host}).status_code in (400, 403)
    assert reader.post("/v1/jobs", headers={"Host": host}).status_code in (400, 403)


def test_admin_may_do_all(keyed: Keyed) -> None:
    admin = keyed.client("scopes", Scope.ADMIN)
    for method, path in CLOSED:
        assert call(admin, method, path).status_code not in (401, 403), (method, path)


@pytest.mark.parametrize(
    "authorization",
    ["Bearer", "Basic dXNlcjpwYXNz", "Bearer aq_", "Bearer aq_key0_0", "Bearer x", f"Bearer {'a' * 5000}",
     "Bearer aq_%s_%s", "aq_key0_0", "Bearer \xe9\xff", "Bearer aq__"],
)  # fmt: skip
def test_what_is_no_key_is_401_and_nothing_more_is_told(keyed: Keyed, authorization: str) -> None:
    response = keyed.anonymous.get("/v1/jobs", headers={"Authorization": authorization.encode("latin-1")})
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith('Bearer realm="arrowquant", error="invalid_token"')
    assert authorization[8:] not in response.text or len(authorization) < 10


def test_the_right_id_with_another_secret_is_not_let_in(keyed: Keyed) -> None:
    client = keyed.client("a")
    assert client.text is not None
    assert client.get("/v1/jobs").status_code == 200
    for wrong in (client.text[:-1], client.text + "A", client.text[:-1] + ("A" if client.text[-1] != "A" else "B")):
        assert keyed.anonymous.get("/v1/jobs", headers={"Authorization": f"Bearer {wrong}"}).status_code == 401
    assert keyed.anonymous.get("/v1/jobs", headers={"Authorization": f"bearer {client.text}"}).status_code == 200
    assert keyed.anonymous.get("/v1/jobs", params={"api_key": client.text}).status_code == 401


def test_a_key_that_the_command_revokes_is_refused_within_a_second(keyed: Keyed) -> None:
    client = keyed.client("revoked")
    assert client.key is not None
    assert client.get("/v1/jobs").status_code == 200
    revoke = [sys.executable, "-m", "service", "keys", "revoke", client.key.id]
    subprocess.run([*revoke, "--data-dir", keyed.server.data_dir], check=True)
    time.sleep(HOLD_S)
    response = client.get("/v1/jobs")
    assert (response.status_code, code_of(response)) == (401, "unauthorized")
    assert "revoked" in response.json()["detail"]
    assert HOLD_S < 1


def test_a_key_that_has_expired_is_refused(keyed: Keyed) -> None:
    expires_at = datetime.now(UTC) + timedelta(seconds=1)
    client = keyed.client("expiring", expires_at=expires_at)
    first = client.get("/v1/jobs")
    time.sleep(max(0.0, (expires_at - datetime.now(UTC)).total_seconds()))
    response = client.get("/v1/jobs")
    assert first.status_code in (200, 401)
    assert response.status_code == 401
    assert "expired" in response.json()["detail"]


def test_a_stream_ends_when_its_key_is_revoked(keyed: Keyed, model_root: Path) -> None:
    client, other = keyed.client("streams"), keyed.client("streams")
    job = client.submit(body(large_model(model_root), "parquet", method="mse", backend="reference"))
    last = ""
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        for line in response.iter_lines():
            last = line if line.startswith("event:") else last
            if last == "event: job.progress" and client.key is not None:
                keyed.revoke(client)
                client.key = None
    assert last not in ("event: job.succeeded", "event: job.failed")
    assert other.delete(f"/v1/jobs/{job['id']}").status_code == 202


def test_a_large_body_without_a_key_is_refused_before_it_is_read(keyed: Keyed) -> None:
    response = keyed.anonymous.post("/v1/tensors:quantize", content=bytes(8 << 20))
    assert response.status_code == 401
    assert response.headers["connection"] == "close"


def test_the_log_never_holds_a_key(start_server: StartServer) -> None:
    server = start_server(require_keys=True, log_level="debug")
    with ApiKeys(server.data_dir) as keys:
        _, text = keys.create("a", [Scope.READ])
    for sent in (text, text + "x"):
        with Client(server, None, sent) as client:
            assert client.get("/v1/jobs").status_code == (200 if sent == text else 401)
    assert "/v1/jobs" in server.log
    assert text.split("_", 2)[2] not in server.log


def test_a_database_that_cannot_be_read_is_a_fault_and_lets_nobody_in(start_server: StartServer) -> None:
    server = start_server(require_keys=True)
    with ApiKeys(server.data_dir) as keys:
        _, text = keys.create("a", [Scope.READ])
    db = sqlite3.connect(server.data_dir / DATABASE)
    db.execute("ALTER TABLE api_keys RENAME TO lost")
    db.close()
    with Client(server, None, text) as client:
        response = client.get("/v1/jobs")
    assert (response.status_code, code_of(response)) == (500, "internal_error")
    assert "api_keys" not in response.text
    # The log tells of the fault, which is what other tests forbid.
    server.stop()
    server.log_path.write_text("")


def test_the_document_says_what_a_key_means_to_each_call() -> None:
    document = build(create_app(Settings()))
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if is_open(path):
                assert operation["security"] == []
                continue
            assert operation["security"] == [{"bearer": []}, {}], "a server may ask for none"
            assert operation["x-scope"] == scope_for(method.upper(), path)
            for status, code in (("401", "unauthorized"), ("403", "forbidden_scope"), ("429", "rate_limited")):
                assert code in operation["responses"][status]["description"], (method, path)
            assert "Retry-After" in operation["responses"]["429"]["headers"]


# --- when keys are asked for ---


def test_on_loopback_nobody_is_asked_for_a_key(server: Server) -> None:
    for headers in ({}, {"Authorization": "Bearer nonsense"}):
        assert server.client.get("/v1/jobs", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_without_a_usable_key_no_server_listens_elsewhere(host: str, tmp_path: Path) -> None:
    settings = Settings(host=host, port=0, data_dir=tmp_path / "data")
    with pytest.raises(InvalidConfig, match="arrowquant keys create"):
        serve(settings)
    assert not settings.data_dir.exists()
    with ApiKeys(settings.data_dir) as keys:
        revoked, _ = keys.create("a", [Scope.READ])
        keys.revoke(revoked.id)
    with pytest.raises(InvalidConfig, match="ALLOW_UNAUTHENTICATED"):
        serve(settings)


@pytest.mark.parametrize(("data", "root"), [("models/data", "models"), ("data", "data/artifacts"), ("data", "data")])
def test_with_keys_the_data_folder_lies_apart_from_the_model_roots(tmp_path: Path, data: str, root: str) -> None:
    with ApiKeys(tmp_path / data) as keys:
        keys.create("a", [Scope.READ])
    settings = Settings(require_keys=True, port=0, data_dir=tmp_path / data, model_roots=(tmp_path / root,))
    with pytest.raises(InvalidConfig, match="hold one another"):
        serve(settings)


def test_with_a_key_a_server_listens_elsewhere_and_asks_for_it(start_server: StartServer, tmp_path: Path) -> None:
    with ApiKeys(tmp_path / "elsewhere") as keys:
        _, text = keys.create("a", [Scope.READ])
    server = start_server(host="0.0.0.0", data_dir=tmp_path / "elsewhere")
    assert server.client.get("/v1/jobs").status_code == 401
    with Client(server, None, text) as client:
        assert client.get("/v1/jobs").status_code == 200


def test_a_server_can_be_told_to_listen_elsewhere_without_keys(start_server: StartServer) -> None:
    server = start_server(host="0.0.0.0", allow_unauthenticated=True)
    assert server.client.get("/v1/jobs").status_code == 200


def test_asking_and_not_asking_for_keys_contradict_each_other() -> None:
    with pytest.raises(InvalidConfig, match="contradict"):
        load_settings(require_keys=True, allow_unauthenticated=True)
