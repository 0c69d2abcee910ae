"""Events over HTTP: replayed, live, resumed, as a page, and behind the end."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.api.test_jobs import large_model
from tests.conftest import StartServer
from tests.engine.helpers import save_folder
from tests.server import Server, body

#: So slow that a job on a large model goes on until it is cancelled.
SLOW = {"backend": "reference", "method": "mse"}


def frames(text: str) -> list[dict[str, str]]:
    """The frames of a stream by field, comments left out."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block]
    return [dict(line.split(": ", 1) for line in block if not line.startswith(":")) for block in blocks]


def stored(server: Server, job_id: str) -> list[dict[str, Any]]:
    """All that the log keeps."""
    response = server.client.get(
        f"/v1/jobs/{job_id}/events", params={"limit": 200}, headers={"Accept": "application/json"}
    )
    assert response.headers["content-type"] == "application/json"
    data: list[dict[str, Any]] = response.json()["data"]
    return data


def test_a_stream_begins_with_retry_and_ends_with_the_job(server: Server, finished: dict[str, Any]) -> None:
    response = server.client.get(finished["links"]["events"])
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    first, *events = frames(response.text)
    assert first == {"retry": "3000"}
    assert [e["event"] for e in events[:2]] == ["job.queued", "job.started"]
    assert events[-1]["event"] == "job.succeeded"
    ids = [int(e["id"]) for e in events]
    assert ids == sorted(set(ids))


def test_the_last_event_holds_the_whole_job(server: Server, finished: dict[str, Any]) -> None:
    last = server.follow(finished["id"])[-1]
    assert last["job"] == server.job(finished["id"])
    assert last["job_id"] == finished["id"]
    assert last["at"]


def test_each_tensor_of_each_output_is_told_once(server: Server, finished: dict[str, Any]) -> None:
    told = [(e["output"], e["name"]) for e in server.follow(finished["id"]) if e["type"] == "tensor.completed"]
    assert len(told) == len(set(told)) == 12


def test_a_resumed_stream_goes_on_behind_the_last_event(server: Server, finished: dict[str, Any]) -> None:
    events = server.follow(finished["id"])
    middle = events[len(events) // 2]["id"]
    rest = [e for e in events if e["id"] > middle]
    assert server.follow(finished["id"], middle) == rest
    by_parameter = server.client.get(finished["links"]["events"], params={"after": middle})
    assert [int(f["id"]) for f in frames(by_parameter.text)[1:]] == [e["id"] for e in rest]


def test_the_header_goes_before_the_parameter(server: Server, finished: dict[str, Any]) -> None:
    last = server.follow(finished["id"])[-1]["id"]
    response = server.client.get(finished["links"]["events"], params={"after": 0}, headers={"Last-Event-ID": str(last)})
    assert response.status_code == 204


def test_behind_the_last_event_there_is_204(server: Server, finished: dict[str, Any]) -> None:
    last = server.follow(finished["id"])[-1]["id"]
    response = server.client.get(finished["links"]["events"], params={"after": last})
    assert (response.status_code, response.content) == (204, b"")


def test_an_id_that_is_no_number_is_refused(server: Server, finished: dict[str, Any]) -> None:
    response = server.client.get(finished["links"]["events"], headers={"Last-Event-ID": "soon"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["parameter"].lower() == "last-event-id"


@pytest.mark.parametrize(
    "id_", ["9223372036854775808", "9" * 20, "9" * 5000], ids=["2**63", "20 digits", "5000 digits"]
)
def test_an_id_beyond_all_ids_is_refused(server: Server, finished: dict[str, Any], id_: str) -> None:
    address = finished["links"]["events"]
    for accept in ("text/event-stream", "application/json"):
        by_parameter = server.client.get(address, params={"after": id_}, headers={"Accept": accept})
        by_header = server.client.get(address, headers={"Last-Event-ID": id_, "Accept": accept})
        for response, name in ((by_parameter, "after"), (by_header, "last-event-id")):
            assert response.status_code == 422, response.text
            assert response.json()["errors"][0]["parameter"].lower() == name
    assert server.client.get(address, params={"after": 2**63 - 1}).status_code == 204


def test_the_page_holds_what_the_stream_replays(server: Server, finished: dict[str, Any]) -> None:
    assert stored(server, finished["id"]) == server.follow(finished["id"])


def test_pages_join_without_gap(server: Server, finished: dict[str, Any]) -> None:
    seen: list[dict[str, Any]] = []
    parameters: dict[str, Any] = {"limit": 4}
    while True:
        page = server.client.get(
            finished["links"]["events"], params=parameters, headers={"Accept": "application/json"}
        ).json()
        seen += page["data"]
        if "next_cursor" not in page:
            break
        parameters["after"] = page["next_cursor"]
    assert seen == stored(server, finished["id"])


def test_an_unknown_form_is_not_acceptable(server: Server, finished: dict[str, Any]) -> None:
    response = server.client.get(finished["links"]["events"], headers={"Accept": "image/png"})
    assert (response.status_code, response.json()["code"]) == (406, "not_acceptable")


def test_a_live_stream_shows_progress_and_the_cancelled_end(server: Server, model_root: Path) -> None:
    job = server.submit(body(large_model(model_root), "parquet"))
    seen: list[dict[str, Any]] = []
    with server.stream(job["id"]) as events:
        for event in events:
            seen.append(event)
            if event["type"] == "job.progress":
                server.cancel(job["id"])
    assert seen[-1]["type"] == "job.cancelled"
    assert all(0 < e["progress"]["fraction"] < 1 for e in seen if e["type"] == "job.progress")
    assert [e["id"] for e in seen] == sorted({e["id"] for e in seen})


def test_readers_that_leave_are_forgotten(start_server: StartServer, model_root: Path) -> None:
    server = start_server()
    job = server.submit(body(large_model(model_root), "parquet"))
    server.wait_for(job["id"], "job.started")
    files = server.open_files()
    for _ in range(20):
        with httpx.stream("GET", f"{server.base_url}/v1/jobs/{job['id']}/events") as response:
            assert next(response.iter_lines()) == "retry: 3000"
    server.cancel(job["id"])
    server.finish(job["id"])
    # A few may still be closing; twenty that stay would show.
    assert server.open_files() < files + 10
    server.stop()
    assert "was destroyed but it is pending" not in server.log


def test_silence_is_broken_by_comments(start_server: StartServer, model_root: Path) -> None:
    server = start_server(max_running_jobs=1, stream_silence_s=0.05)
    blocker, waiting = (server.submit(body(large_model(model_root), "parquet", **SLOW)) for _ in range(2))
    lines: list[str] = []
    with httpx.stream("GET", f"{server.base_url}{waiting['links']['events']}", timeout=90) as response:
        for line in response.iter_lines():
            lines += [line] if line else []
            if lines.count(": silence") == 5:
                break
    assert [line for line in lines if line.startswith("event: ")] == ["event: job.queued"]
    for job in (waiting, blocker):
        server.cancel(job["id"])
        server.finish(job["id"])


def test_a_reader_that_is_too_slow_is_told_so_and_resumes_without_a_gap(
    start_server: StartServer, model_root: Path
) -> None:
    server = start_server(max_running_jobs=1, max_unread_events=8)
    # Long names make long events: no buffer on the way holds all of them.
    tensors = {f"{'n' * 5000}.{i}.weight": np.ones((16, 32), np.float32) for i in range(200)}
    save_folder(model_root / "long-names", tensors)
    blocker = server.submit(body(large_model(model_root), "parquet", **SLOW))
    job = server.submit(body(model_root / "long-names", "parquet"))
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.client.base_url.port))
        call = f"GET {job['links']['events']} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        slow.sendall(call.encode())
        # It has begun to follow, and reads nothing until the job has ended.
        assert slow.recv(1)
        server.cancel(blocker["id"])
        assert server.finish(job["id"])["status"] == "succeeded"
        received = b"".join(iter(lambda: slow.recv(1 << 20), b"")).decode()
    events = [json.loads(line[len("data: ") :]) for line in received.splitlines() if line.startswith("data: ")]
    assert events[-1]["type"] == "reader.too_slow"
    assert "id" not in events[-1]
    seen = [e for e in events[:-1] if e["type"] != "job.progress"]
    assert seen
    rest = server.follow(job["id"], max(e["id"] for e in events[:-1]))
    assert len(rest) > 8
    assert seen + rest == server.follow(job["id"])


def test_events_are_told_apart_by_their_type(server: Server, finished: dict[str, Any]) -> None:
    document = server.client.get("/openapi.json").json()
    mapping = document["components"]["schemas"]["Event"]["discriminator"]["mapping"]
    assert {e["type"] for e in server.follow(finished["id"])} <= mapping.keys()
    assert {"job.queued", "job.progress", "reader.too_slow", "server.draining"} <= mapping.keys()
    assert json.dumps(document["paths"]["/v1/jobs/{job_id}/events"]).count("EventPage") == 1
