"""Idempotency keys over HTTP: a call that comes twice makes one thing, and gets one answer."""

from __future__ import annotations

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from service.jobs.store import DATABASE
from tests.api.keyed import Keyed
from tests.api.test_jobs import large_model
from tests.conftest import StartServer
from tests.server import Json, Server, body


def create(server: Server, asked: Json, key: str, path: str = "/v1/jobs", **headers: str) -> httpx.Response:
    """POST with a key."""
    return server.client.post(path, json=asked, headers={"Idempotency-Key": key} | headers)


def check_same(first: httpx.Response, again: httpx.Response) -> None:
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert again.headers["location"] == first.headers["location"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"


def job_ids(server: Server) -> list[str]:
    return [job["id"] for job in server.client.get("/v1/jobs", params={"limit": 200}).json()["data"]]


def stored_keys(server: Server) -> list[str]:
    """What the database of a stopped server holds."""
    with closing(sqlite3.connect(server.data_dir / DATABASE)) as db:
        return [row[0] for row in db.execute("SELECT key FROM idempotency_keys ORDER BY key")]


def as_batch(asked: Json) -> Json:
    return {"items": [asked, asked], "labels": {"a": "b"}}


@pytest.mark.parametrize("kind", ["job", "batch"])
def test_the_same_call_gets_the_first_answer_again_whatever_has_happened_since(
    server: Server, model: Path, kind: str
) -> None:
    asked, path = body(model, "parquet"), "/v1/jobs"
    if kind == "batch":
        asked, path = as_batch(asked), "/v1/batches"
    key = str(uuid4())
    first = create(server, asked, key, path)
    assert first.status_code == 202
    before = job_ids(server)
    check_same(first, create(server, asked, key, path))
    ended = server.client.get(first.headers["location"], headers={"Prefer": "wait=60"}).json()
    assert ended["status"] in ("succeeded", "ended")
    check_same(first, create(server, asked, key, path))
    server.client.delete(first.headers["location"], params={"purge": "true"})
    check_same(first, create(server, asked, key, path))
    assert set(job_ids(server)) < set(before), "nothing new was made"


def test_the_same_body_in_another_order_is_the_same_body(server: Server, model: Path) -> None:
    asked, key = body(model, "parquet", bit_width=4, group_size=64), str(uuid4())
    first = create(server, asked, key)
    check_same(first, create(server, dict(reversed(asked.items())), key))
    server.finish(first.json()["id"])


def test_without_a_key_every_call_makes_its_own(server: Server, model: Path) -> None:
    ids = {server.submit(body(model, "parquet"))["id"] for _ in range(2)}
    assert len(ids) == 2
    for job_id in ids:
        server.finish(job_id)


def test_another_body_or_address_under_the_same_key_is_refused(server: Server, model: Path) -> None:
    asked, key = body(model, "parquet"), str(uuid4())
    first = create(server, asked, key)
    for response in (
        create(server, asked | {"priority": 1}, key),
        create(server, {"items": [asked]}, key, "/v1/batches"),
    ):
        assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")
    check_same(first, create(server, asked, key))
    server.finish(first.json()["id"])


def test_a_refused_body_is_not_remembered(server: Server, model: Path) -> None:
    asked, key = body(model, "parquet"), str(uuid4())
    wrong = [
        body(model, "parquet", bit_width=9),
        body(model / "absent", "parquet"),
        body(model, {"format": "parquet", "config": {"scheme": "int4", "bit_width": 3}}),
    ]
    for refused in wrong:
        assert create(server, refused, key).status_code in (404, 422), refused
    first = create(server, asked, key)
    assert first.status_code == 202
    server.finish(first.json()["id"])


@pytest.mark.parametrize("key", ["", "a b", "ü", "x" * 256])
def test_a_key_that_is_none_is_refused_by_name(server: Server, model: Path, key: str) -> None:
    headers = {b"Idempotency-Key": key.encode(), b"Content-Type": b"application/json"}
    response = server.client.post("/v1/jobs", json=body(model, "parquet"), headers=headers)
    assert response.status_code == 422
    assert response.json()["errors"][0]["parameter"].lower() == "idempotency-key"


def test_twenty_calls_at_once_with_one_key_make_one_job(start_server: StartServer, model: Path) -> None:
    server = start_server()
    asked, key = body(model, "parquet"), str(uuid4())
    barrier = threading.Barrier(20)

    def call(_: int) -> httpx.Response:
        with httpx.Client(base_url=server.base_url, timeout=60) as client:
            barrier.wait()
            return client.post("/v1/jobs", json=asked, headers={"Idempotency-Key": key})

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(call, range(20)))
    made = [a for a in answers if a.status_code == 202]
    refused = [a for a in answers if a.status_code != 202]
    assert len({a.content for a in made}) == 1
    assert {(a.status_code, a.json()["code"]) for a in refused} <= {(409, "idempotency_key_in_flight")}
    assert all(int(a.headers["retry-after"]) > 0 for a in refused)
    assert sum("idempotency-replayed" not in a.headers for a in made) == 1
    assert job_ids(server) == [made[0].json()["id"]]
    server.finish(made[0].json()["id"])


def test_a_call_that_still_waits_is_in_flight_and_its_last_answer_is_kept(
    start_server: StartServer, model_root: Path
) -> None:
    server = start_server()
    asked, key = body(large_model(model_root), "parquet"), str(uuid4())
    answers: list[httpx.Response] = []

    def wait() -> None:
        with httpx.Client(base_url=server.base_url, timeout=90) as client:
            headers = {"Idempotency-Key": key, "Prefer": "wait=60"}
            answers.append(client.post("/v1/jobs", json=asked, headers=headers))

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not (ids := job_ids(server)):
        time.sleep(0.01)
    response = create(server, asked, key)
    assert (response.status_code, response.json()["code"]) == (409, "idempotency_key_in_flight")
    server.cancel(ids[0])
    waiting.join(60)
    assert answers[0].json()["status"] in ("cancelling", "cancelled")
    again = create(server, asked, key)
    check_same(answers[0], again)
    assert again.headers["preference-applied"] == "wait=60"
    assert job_ids(server) == ids


def test_a_caller_that_hangs_up_while_it_waits_can_call_again_at_once(
    start_server: StartServer, model_root: Path
) -> None:
    server = start_server(max_running_jobs=1)
    # Nothing but a cancel ends the second job.
    blocker = server.submit(body(large_model(model_root), "parquet", backend="reference"))
    asked, key = body(large_model(model_root), "parquet", backend="reference"), str(uuid4())
    headers = {"Idempotency-Key": key, "Prefer": "wait=60"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.base_url}/v1/jobs", json=asked, headers=headers, timeout=1.0)
    begun = time.monotonic()
    while (again := create(server, asked, key)).status_code == 409:
        assert again.json()["code"] == "idempotency_key_in_flight"
        assert time.monotonic() < begun + 30, "it waits for nobody"
        time.sleep(0.01)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json()["status"] in ("queued", "running")
    assert job_ids(server) == [again.json()["id"], blocker["id"]]
    for job_id in job_ids(server):
        server.cancel(job_id)
        server.finish(job_id)


def test_a_key_lives_through_a_restart_and_a_kill(start_server: StartServer, model: Path) -> None:
    server = start_server()
    asked, key = body(model, "parquet"), str(uuid4())
    first = create(server, asked, key)
    server.kill()
    server.start()
    check_same(first, create(server, asked, key))
    server.finish(first.json()["id"])
    server.stop()
    server.start()
    check_same(first, create(server, asked, key))
    assert job_ids(server) == [first.json()["id"]]


def test_whenever_the_server_is_killed_a_retry_finds_one_job(start_server: StartServer, model: Path) -> None:
    server = start_server()
    asked, keys = body(model, "parquet"), []
    for attempt in range(6):
        keys.append(str(uuid4()))
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(create, server, asked, keys[-1])
            # An answer takes some milliseconds: kills before, within and after what is stored.
            time.sleep(0.003 * attempt)
            server.process.kill()
            with suppress(httpx.TransportError):
                sending.result(30)
        server.kill()
        server.start()
        answers = [create(server, asked, keys[-1]) for _ in range(2)]
        assert answers[0].content == answers[1].content
        assert answers[0].status_code == 202
    ids = job_ids(server)
    assert len(ids) == len(keys)
    for job_id in ids:
        assert server.finish(job_id)["status"] == "succeeded"


def test_tenants_may_use_the_same_key_and_the_keys_of_one_tenant_are_one(keyed: Keyed, model: Path) -> None:
    ours, colleague, theirs = keyed.client("ours"), keyed.client("ours"), keyed.client("theirs")
    asked, headers = body(model, "parquet"), {"Idempotency-Key": "monday"}
    first, again, other = (c.post("/v1/jobs", json=asked, headers=headers) for c in (ours, colleague, theirs))
    check_same(first, again)
    assert (other.status_code, "idempotency-replayed" in other.headers) == (202, False)
    assert other.json()["id"] != first.json()["id"]
    changed = theirs.post("/v1/jobs", json=asked | {"priority": 1}, headers=headers)
    assert changed.json()["code"] == "idempotency_key_reused"
    for client, answer in ((ours, first), (theirs, other)):
        client.get(answer.headers["location"], headers={"Prefer": "wait=60"})


def test_an_expired_key_is_removed_and_free_again(start_server: StartServer, model: Path) -> None:
    server = start_server()
    asked = body(model, "parquet")
    old, young = (create(server, asked, key) for key in ("old", "young"))
    for response in (old, young):
        server.finish(response.json()["id"])
    server.stop()
    assert stored_keys(server) == ["old", "young"]
    with closing(sqlite3.connect(server.data_dir / DATABASE, isolation_level=None)) as db:
        set_back = (
            "UPDATE idempotency_keys SET created_at = strftime('%Y-%m-%dT%H:%M:%f000+00:00', 'now', ?) WHERE key = ?"
        )
        db.execute(set_back, ("-25 hours", "old"))
        db.execute(set_back, ("-23 hours", "young"))
    server.start()
    check_same(young, create(server, asked, "young"))
    again = create(server, asked, "old")
    assert (again.status_code, "idempotency-replayed" in again.headers) == (202, False)
    assert again.json()["id"] != old.json()["id"]
    server.finish(again.json()["id"])
    server.stop()
    with closing(sqlite3.connect(server.data_dir / DATABASE, isolation_level=None)) as db:
        db.execute(set_back, ("-25 hours", "young"))
    server.start()
    server.stop()
    assert stored_keys(server) == ["old"]
