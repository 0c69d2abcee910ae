"""The log: JSON or text, with the ids of calls and jobs, and nothing that a client sends makes a line of its own."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from service.jobs.api_keys import ApiKeys, Scope
from service.jobs.store import DATABASE
from service.logs import INDENT
from tests.api.keyed import Client
from tests.conftest import StartServer
from tests.server import Server, body

FORGED = "\n2026-01-01 00:00:00,000 INFO service.api.server: all is well\r\x1b[31m\x1b]0;owned\x07\u202e\u2028end"


def records(server: Server) -> list[dict[str, Any]]:
    """Every line of a log in JSON."""
    found = [json.loads(line) for line in server.log.splitlines()]
    for record in found:
        assert {"time", "level", "logger", "message"} <= record.keys(), record
    return found


def test_every_line_is_json_and_names_the_job_and_the_call_that_made_it(start_server: StartServer, model: Path) -> None:
    server = start_server(log_format="json")
    response = server.client.post("/v1/jobs", json=body(model, "parquet"), headers={"X-Request-ID": "call-1"})
    job = server.finish(response.json()["id"])
    server.client.get("/metrics")
    server.stop()
    lines = records(server)
    told = [line["message"].split()[0] for line in lines if line.get("job_id") == job["id"]]
    assert told == ["accepted,", "running", "succeeded"]
    for line in lines:
        if "job_id" in line:
            assert (line["request_id"], line["tenant"]) == ("call-1", "default")
    access = [line for line in lines if line["logger"] == "service.access"]
    posted = next(line for line in access if line["method"] == "POST")
    assert (posted["route"], posted["status"], posted["request_id"]) == ("/v1/jobs", 202, "call-1")
    assert posted["bytes"] == len(response.content)
    assert posted["seconds"] > 0
    assert not [line for line in access if line["route"] in ("/metrics", "/readyz", "/healthz")]
    assert {line["logger"] for line in lines} >= {"uvicorn.error", "service.api.server"}


def test_a_job_that_goes_on_in_another_server_still_names_its_call(start_server: StartServer, model: Path) -> None:
    server = start_server(log_format="json", max_running_jobs=1)
    slow = body(model, "parquet", method="mse", backend="reference")
    for number in range(3):
        server.client.post("/v1/jobs", json=slow, headers={"X-Request-ID": f"call-{number}"})
    server.kill()
    server.start()
    for job in server.client.get("/v1/jobs").json()["data"]:
        assert server.finish(job["id"])["status"] == "succeeded"
    server.stop()
    ended = [line for line in records(server) if line["message"].startswith("succeeded")]
    assert {line["request_id"] for line in ended} == {"call-0", "call-1", "call-2"}


@pytest.mark.parametrize("format_", ["text", "json"])
def test_no_client_forges_a_line(start_server: StartServer, model: Path, format_: str) -> None:
    server = start_server(log_format=format_, log_level="debug")
    client = server.client
    path = "".join(f"%{byte:02x}" for byte in FORGED.encode())
    client.get(f"/v1/jobs/{path}")
    client.get(f"/{path}")
    client.get("/v1/jobs", headers={"X-Request-ID": "\x1b[31m id"})
    asked = body(model, "parquet") | {"labels": {"a": FORGED}}
    client.post("/v1/jobs", json=asked)
    # A job that fails on what it was given has its reason in the log.
    client.post("/v1/jobs", json=body({"type": "uri", "uri": f"file:///{path}"}, "parquet"))
    server.stop()
    assert "all is well" in server.log, "the paths are in the log"
    raw = server.log_path.read_bytes().decode()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", raw), "only what can be seen, and newlines"
    assert not re.search(r"^2026-01-01", raw, re.MULTILINE)
    if format_ == "json":
        records(server)


def test_a_text_log_tells_calls_only_when_asked(start_server: StartServer, model: Path) -> None:
    quiet = start_server()
    job = quiet.run(body(model, "parquet"))
    quiet.stop()
    assert "service.access" not in quiet.log
    assert re.search(rf"INFO service\S+: succeeded after .*\[.*job_id={job['id']}.*\]", quiet.log)
    told = start_server(log_level="debug")
    told.client.get("/v1/jobs?label=secret:word")
    told.stop()
    assert re.search(r"DEBUG service.access: GET /v1/jobs 200 .*\[request_id=req_\S+\]", told.log)
    assert "secret" not in told.log, "queries are not logged"


@pytest.mark.parametrize("format_", ["text", "json"])
def test_the_id_of_a_fault_is_in_the_log_with_its_traceback(start_server: StartServer, format_: str) -> None:
    server = start_server(log_format=format_, require_keys=True)
    with ApiKeys(server.data_dir) as keys:
        _, text = keys.create("a", [Scope.READ])
    db = sqlite3.connect(server.data_dir / DATABASE)
    db.execute("ALTER TABLE api_keys RENAME TO lost")
    db.close()
    with Client(server, None, text) as client:
        response = client.get("/v1/jobs", headers={"X-Request-ID": "the-call"})
    assert response.status_code == 500
    assert "the-call" in response.json()["detail"]
    server.stop()
    if format_ == "json":
        fault = next(line for line in records(server) if line["level"] == "ERROR")
        assert fault["request_id"] == "the-call"
        assert "no such table: api_keys" in fault["exc_info"]
        access = next(line for line in records(server) if line["logger"] == "service.access")
        assert (access["status"], access["request_id"]) == (500, "the-call")
    else:
        assert re.search(r"ERROR .*the-call", server.log)
        assert f"\n{INDENT}Traceback" in server.log
    # The log tells of the fault, which is what other tests forbid.
    server.log_path.write_text("")
