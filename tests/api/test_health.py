"""Liveness and readiness, and where a server may listen."""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from service import __version__
from service.api.server import serve
from service.errors import InvalidConfig
from service.jobs.store import DATABASE
from service.settings import Settings
from tests.conftest import StartServer
from tests.server import Server, body


def test_a_living_server_says_so(server: Server) -> None:
    assert server.client.get("/healthz").json() == {"status": "ok", "version": __version__}


def test_a_ready_server_says_what_it_computes_with(server: Server) -> None:
    ready = server.client.get("/readyz").json()
    assert ready["status"] == "ready"
    assert ready["backend"] in ("cpu", "cuda")
    assert ready["longest_stall_s"] >= 0
    assert ready["lost_devices"] == {}


def test_a_server_that_cannot_write_is_not_ready(start_server: StartServer) -> None:
    server = start_server()
    shutil.rmtree(server.data_dir)
    response = server.client.get("/readyz")
    assert (response.status_code, response.json()["code"]) == (503, "not_ready")
    assert int(response.headers["retry-after"]) > 0
    assert "data folder" in response.json()["detail"]
    assert server.client.get("/healthz").status_code == 200
    server.kill()


def test_a_server_that_cannot_store_what_happens_is_not_ready_until_it_can(
    start_server: StartServer, model: Path
) -> None:
    server = start_server()
    with closing(sqlite3.connect(server.data_dir / DATABASE, isolation_level=None)) as database:
        refusal = "BEGIN SELECT raise(ABORT, 'a fault'); END"
        database.execute(f"CREATE TRIGGER refuse BEFORE UPDATE ON jobs {refusal}")
        job = server.submit(body(model, "parquet"))
        answer = server.client.get("/readyz")
        for _ in range(1000):
            if "a fault keeps" in answer.text:
                break
            time.sleep(0.01)
            answer = server.client.get("/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        database.execute("DROP TRIGGER refuse")
    assert server.finish(job["id"])["status"] == "succeeded"
    assert server.client.get("/readyz").status_code == 200
    assert "the job database reported 'a fault'" in server.log


def test_a_port_that_is_taken_is_said_plainly(server: Server) -> None:
    port = int(server.base_url.rsplit(":", 1)[1])
    with pytest.raises(InvalidConfig, match="cannot listen"):
        serve(Settings(port=port))
