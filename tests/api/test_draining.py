"""SIGTERM: streams are told, waiting calls answered, jobs kept, and the process is gone."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from fastapi.testclient import TestClient

from service.api.app import create_app
from service.settings import Settings
from tests.api.test_jobs import large_model
from tests.conftest import StartServer
from tests.server import body

HALF_A_CALL = (
    b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
)


def test_streams_end_with_a_word_and_the_job_goes_on_later(start_server: StartServer, model_root: Path) -> None:
    server = start_server()
    job = server.submit(body(large_model(model_root), "parquet"))
    seen: list[dict[str, Any]] = []
    with server.stream(job["id"]) as events:
        for event in events:
            seen.append(event)
            if event["type"] == "job.progress" and server.is_running:
                server.process.send_signal(signal.SIGTERM)
    assert seen[-1]["type"] == "server.draining"
    assert "id" not in seen[-1]
    assert server.process.wait(30) == 0

    server.client.close()
    server.start()
    rest = server.follow(job["id"], seen[-2]["id"])
    assert "job.resumed" in [e["type"] for e in rest]
    assert all(e["id"] > seen[-2]["id"] for e in rest)
    assert rest[-1]["type"] == "job.succeeded"


def test_open_streams_slow_readers_and_waiting_calls_hold_nothing_up(
    start_server: StartServer, model: Path, model_root: Path
) -> None:
    server = start_server(max_running_jobs=1)
    # What has to be compiled is compiled: a compiler cannot be stopped half-way.
    server.run(body(model, "parquet"))
    asked = body(large_model(model_root), "parquet", backend="reference")  # which takes a minute
    running, queued = (server.submit(asked) for _ in range(2))
    server.wait_for(running["id"], "job.started")
    url = httpx.URL(server.base_url)
    answers: list[httpx.Response] = []

    def wait() -> None:
        address = f"{server.base_url}/v1/jobs/{queued['id']}"
        answers.append(httpx.get(address, headers={"Prefer": "wait=60"}, timeout=90))

    waiting = threading.Thread(target=wait)
    waiting.start()
    # Readers that take nothing: one of a stream, one of a half-sent request.
    silent = [socket.create_connection((url.host, url.port or 80)) for _ in range(2)]
    silent[0].sendall(f"GET /v1/jobs/{queued['id']}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    silent[1].sendall(HALF_A_CALL)
    with server.stream(queued["id"]) as events:
        assert next(events)["type"] == "job.queued"
        time.sleep(0.2)
        seconds = server.stop()
    waiting.join(30)
    for connection in silent:
        connection.close()
    print(f"drained in {seconds:.2f} s")
    # Whatever held it up would do so for as long as the call waits, a minute.
    assert seconds < 10
    assert [a.status_code for a in answers] == [200]
    assert answers[0].json()["status"] == "queued"


def test_a_draining_server_takes_no_jobs_and_says_when_to_come_back(tmp_path: Path, model_root: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path / "data", model_roots=(model_root,)))
    with TestClient(app, "http://localhost") as client:
        client.portal.call(app.state.api.drain)
        for response in (client.post("/v1/jobs", json=body(model_root, "parquet")), client.get("/readyz")):
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0
        assert client.get("/healthz").status_code == 200


def test_a_second_server_on_the_same_data_is_refused_in_one_sentence(start_server: StartServer) -> None:
    server = start_server()
    command = [sys.executable, "-m", "service", "serve", "--port", "0", "--data-dir", str(server.data_dir)]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode != 0
    assert "another server" in second.stderr
    assert "Traceback" not in second.stderr
