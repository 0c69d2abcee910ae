"""Batches over HTTP: accepted whole or not at all, followed in one stream, cancelled and purged together."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import connect_sse
from jsonschema import Draft202012Validator

from service.jobs.store import DATABASE
from tests.api.conftest import save_model
from tests.api.test_events import frames
from tests.api.test_jobs import LARGE_TENSORS, large_model
from tests.api.test_problems import problem_of
from tests.conftest import StartServer
from tests.server import Json, Server, body

LOG = {"Accept": "application/json"}


def create(server: Server, *items: Json, **fields: Any) -> Json:
    """Create a batch; the answer."""
    response = server.client.post("/v1/batches", json={"items": list(items)} | fields)
    assert response.status_code == 202, response.text
    batch: Json = response.json()
    assert response.headers["location"] == batch["links"]["self"] == f"/v1/batches/{batch['id']}"
    return batch


def finish(server: Server, batch: Json) -> Json:
    """The batch when all of it has ended."""
    while True:
        response = server.client.get(batch["links"]["self"], headers={"Prefer": "wait=60"})
        assert response.headers["preference-applied"] == "wait=60"
        answer: Json = response.json()
        if answer["status"] == "ended":
            return answer


@contextmanager
def stream(server: Server, batch: Json, last_event_id: int = 0) -> Iterator[Iterator[Json]]:
    """The merged events as they come."""
    headers = {"Last-Event-ID": str(last_event_id)}
    with (
        httpx.Client(base_url=server.base_url, timeout=90) as client,
        connect_sse(client, "GET", batch["links"]["events"], headers=headers) as source,
    ):
        source.response.raise_for_status()
        yield (json.loads(frame.data) for frame in source.iter_sse() if frame.data)


def follow(server: Server, batch: Json, last_event_id: int = 0) -> list[Json]:
    with stream(server, batch, last_event_id) as events:
        return list(events)


def kept(events: list[Json]) -> list[Json]:
    return [e for e in events if e["type"] != "job.progress"]


@pytest.fixture(scope="session")
def ended(server: Server, model: Path) -> Json:
    """A batch of three whose jobs have all succeeded."""
    items = [body(model, "parquet", bit_width=bits) for bits in (2, 4, 8)]
    return finish(server, create(server, *items, labels={"suite": "small"}))


def test_creating_answers_the_batch_and_each_item_becomes_a_job(server: Server, model: Path) -> None:
    batch = create(server, body(model, "parquet", bit_width=2), body(model, "parquet") | {"labels": {"x": "1"}})
    assert batch["id"].startswith("batch_")
    assert batch["status"] == "in_progress"
    assert batch["counts"] == Counter(total=2, queued=2) | dict.fromkeys(
        ("running", "cancelling", "succeeded", "failed", "cancelled"), 0
    )
    done = finish(server, batch)
    assert (done["counts"]["succeeded"], done["job_ids"]) == (2, batch["job_ids"])
    assert done["finished_at"] > done["created_at"]
    for index, job_id in enumerate(batch["job_ids"]):
        job = server.job(job_id)
        assert (job["status"], job["batch_id"], job["batch_index"]) == ("succeeded", batch["id"], index)
    assert server.job(batch["job_ids"][0])["config"]["bit_width"] == 2
    assert server.job(batch["job_ids"][1])["labels"] == {"x": "1"}


def test_jobs_are_found_by_their_batch(server: Server, model: Path, ended: Json) -> None:
    server.run(body(model, "parquet"))
    page = server.client.get(ended["links"]["jobs"]).json()
    assert [job["id"] for job in page["data"]] == ended["job_ids"][::-1]
    first = server.client.get("/v1/jobs", params={"batch_id": ended["id"], "limit": 2}).json()
    rest = server.client.get(
        "/v1/jobs", params={"batch_id": ended["id"], "status": "succeeded", "after": first["next_cursor"]}
    ).json()
    assert [job["id"] for job in first["data"] + rest["data"]] == ended["job_ids"][::-1]
    for nothing in ({"batch_id": "batch_none"}, {"batch_id": ended["id"], "status": "failed"}):
        assert server.client.get("/v1/jobs", params=nothing).json() == {"data": []}


def test_pages_hold_every_batch_once_newest_first(start_server: StartServer, model: Path) -> None:
    server = start_server()
    batches = [create(server, body(model, "parquet"), labels={"n": str(n)}) for n in range(3)]
    first = server.client.get("/v1/batches", params={"limit": 2}).json()
    rest = server.client.get("/v1/batches", params={"limit": 2, "after": first["next_cursor"]}).json()
    listed = first["data"] + rest["data"]
    assert "next_cursor" not in rest
    assert [batch["id"] for batch in listed] == [batch["id"] for batch in reversed(batches)]
    assert listed[0]["labels"] == {"n": "2"}
    assert "job_ids" not in listed[0]
    for batch in batches:
        finish(server, batch)


def test_one_wrong_item_and_none_is_accepted(server: Server, model: Path, model_root: Path) -> None:
    good, before = body(model, "parquet"), server.client.get("/v1/jobs").json()
    pickled = model_root / "pickled"
    pickled.mkdir(exist_ok=True)
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    target = {"format": "parquet", "uri": (model_root / "batch-target").as_uri()}
    wrong: list[tuple[list[Json], int, str]] = [
        ([good, good, good, body(model, "parquet", bit_width=9)], 422, "/items/3/config/bit_width"),
        ([good, good | {"priority": "high"}], 422, "/items/1/priority"),
        ([good, {"kind": "magic"}], 422, "/items/1/kind"),
        ([good, body(Path("/etc"), "parquet")], 403, "/items/1/source/uri"),
        ([good, body(model / "absent", "parquet")], 404, "/items/1/source/uri"),
        ([body(pickled / "pytorch_model.bin", "parquet"), good], 422, "/items/0"),
        ([good, good, body(model, "parquet", backend="cuda")], 422, "/items/2/config"),
        ([body(model, target), good, body(model, target)], 409, "/items/2"),
        ([], 422, "/items"),
        ([good] * 1001, 422, "/items"),
    ]
    for items, status, pointer in wrong:
        response = server.client.post("/v1/batches", json={"items": items})
        problem = response.json()
        found = [error["pointer"] for error in problem.get("errors", [{"pointer": ""}])]
        assert (response.status_code, found[0][: len(pointer)]) == (status, pointer), problem
    assert server.client.get("/v1/jobs").json() == before
    assert not (model_root / "batch-target").exists()
    # The target is free again.
    done = finish(server, create(server, body(model, target)))
    assert done["counts"]["succeeded"] == 1


def test_a_queue_without_room_for_all_takes_none(start_server: StartServer, model_root: Path) -> None:
    server = start_server(max_running_jobs=1, max_queued_jobs=3)
    asked = body(large_model(model_root), "parquet")
    running = server.submit(asked)
    server.wait_for(running["id"], "job.started")
    response = server.client.post("/v1/batches", json={"items": [asked] * 4})
    assert (response.status_code, response.json()["code"]) == (429, "queue_full")
    assert int(response.headers["retry-after"]) > 0
    batch = create(server, asked, asked, asked)
    assert server.client.post("/v1/jobs", json=asked).status_code == 429
    response = server.client.delete(batch["links"]["self"])
    assert (response.status_code, response.json()["status"]) == (202, "ended")
    assert response.json()["counts"]["cancelled"] == 3
    server.cancel(running["id"])
    server.finish(running["id"])


def test_a_failing_item_leaves_the_others_alone(server: Server, model: Path, model_root: Path) -> None:
    broken = save_model(model_root / "broken-item")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-1000])
    done = finish(server, create(server, body(model, "parquet"), body(broken, "parquet"), body(model, "parquet")))
    assert [server.job(job_id)["status"] for job_id in done["job_ids"]] == ["succeeded", "failed", "succeeded"]
    assert (done["counts"]["succeeded"], done["counts"]["failed"]) == (2, 1)


def test_a_cancelled_item_leaves_the_others_alone(server: Server, model: Path, model_root: Path) -> None:
    batch = create(server, body(large_model(model_root), "parquet"), body(model, "parquet"))
    server.cancel(batch["job_ids"][0])
    done = finish(server, batch)
    assert [server.job(job_id)["status"] for job_id in done["job_ids"]] == ["cancelled", "succeeded"]


def test_the_merged_stream_has_every_event_of_every_item_under_ids_that_grow(server: Server, ended: Json) -> None:
    events = follow(server, ended)
    assert [e["id"] for e in events] == sorted({e["id"] for e in events})
    for index, job_id in enumerate(ended["job_ids"]):
        own = [e for e in events if e["job_id"] == job_id]
        assert {e["index"] for e in own} == {index}
        shown = [{k: v for k, v in e.items() if k not in ("id", "index")} for e in own]
        assert shown == [{k: v for k, v in e.items() if k != "id"} for e in server.follow(job_id)]
    assert events[-1]["type"] == "job.succeeded"
    assert events[-1]["job"]["batch_id"] == ended["id"]


def test_a_live_stream_shows_what_its_replay_shows_and_ends_with_the_last_item(
    server: Server, model: Path, model_root: Path
) -> None:
    batch = create(server, body(large_model(model_root), "parquet"), body(model, "parquet"), body(model, "parquet"))
    live = follow(server, batch)
    assert {e["index"] for e in live if e["type"] == "job.progress"} >= {0}
    assert kept(live) == follow(server, batch)
    assert Counter(e["type"] for e in live)["job.succeeded"] == 3
    assert server.client.get(batch["links"]["self"]).json()["status"] == "ended"


def test_a_stream_goes_on_behind_any_event_and_is_204_behind_the_last(server: Server, ended: Json) -> None:
    events = follow(server, ended)
    for place in (1, len(events) // 2, len(events) - 1):
        assert follow(server, ended, events[place - 1]["id"]) == events[place:]
    address = ended["links"]["events"]
    response = server.client.get(address, headers={"Last-Event-ID": str(events[-1]["id"])})
    assert (response.status_code, response.content) == (204, b"")
    first, *_ = frames(server.client.get(address, params={"after": events[-2]["id"]}).text)
    assert first == {"retry": "3000"}


def test_pages_of_the_log_join_to_what_the_stream_replays(server: Server, ended: Json) -> None:
    seen: list[Json] = []
    parameters: dict[str, Any] = {"limit": 5}
    while True:
        page = server.client.get(ended["links"]["events"], params=parameters, headers=LOG).json()
        seen += page["data"]
        if "next_cursor" not in page:
            break
        parameters["after"] = page["next_cursor"]
    assert seen == follow(server, ended)


@pytest.mark.parametrize("id_", ["9223372036854775808", "9" * 5000], ids=["2**63", "5000 digits"])
def test_an_id_beyond_all_ids_is_refused(server: Server, ended: Json, id_: str) -> None:
    address = ended["links"]["events"]
    for headers in ({"Accept": "text/event-stream"}, LOG):
        by_parameter = server.client.get(address, params={"after": id_}, headers=headers)
        by_header = server.client.get(address, headers=headers | {"Last-Event-ID": id_})
        for response, name in ((by_parameter, "after"), (by_header, "last-event-id")):
            assert problem_of(response, 422, "invalid_request")["errors"][0]["parameter"].lower() == name
    assert server.client.get(address, params={"after": 2**63 - 1}).status_code == 204


@pytest.mark.parametrize("end", ["", "/{}", "/{}/events"])
def test_a_parameter_that_a_call_does_not_have_is_refused(server: Server, ended: Json, end: str) -> None:
    response = server.client.get(f"/v1/batches{end.format(ended['id'])}", params={"limt": "5"})
    assert problem_of(response, 422, "invalid_request")["errors"][0]["parameter"] == "limt"


@pytest.mark.parametrize("cursor", ["garbage", "", "job_01a0b2c3-0000-7000-8000-000000000000"])
def test_a_cursor_of_another_list_is_refused(server: Server, cursor: str) -> None:
    response = server.client.get("/v1/batches", params={"after": cursor})
    assert problem_of(response, 422, "invalid_request")["errors"][0]["parameter"] == "after"


def test_a_misspelt_purge_cancels_nothing(server: Server, model_root: Path) -> None:
    batch = create(server, body(large_model(model_root), "parquet"))
    response = server.client.delete(batch["links"]["self"], params={"pruge": "true"})
    assert "it takes purge" in problem_of(response, 422, "invalid_request")["detail"]
    assert server.client.get(batch["links"]["self"]).json()["status"] == "in_progress"
    server.client.delete(batch["links"]["self"])
    finish(server, batch)


def test_a_label_that_no_filter_could_name_is_refused(server: Server, model: Path) -> None:
    response = server.client.post("/v1/batches", json={"items": [body(model, "parquet")], "labels": {"team:a": "b"}})
    problem = problem_of(response, 422, "invalid_request")
    assert [e["pointer"] for e in problem["errors"]] == ["/labels/team:a"]


def test_an_address_that_a_running_job_writes_to_is_named(
    server: Server, model: Path, model_root: Path, tmp_path: Path
) -> None:
    target = {"format": "parquet", "uri": (model_root / f"{tmp_path.name}-taken").as_uri()}
    holder = server.submit(body(large_model(model_root), target))
    response = server.client.post(
        "/v1/batches", json={"items": [body(model, "parquet"), body(model, "compressed-tensors", target)]}
    )
    assert problem_of(response, 409, "target_in_use")["errors"][0]["pointer"] == "/items/1/outputs/1/uri"
    server.cancel(holder["id"])
    server.finish(holder["id"])


def test_cancelling_ends_what_is_left_and_is_harmless_when_repeated(
    start_server: StartServer, model: Path, model_root: Path
) -> None:
    server = start_server(max_running_jobs=1)
    large = body(large_model(model_root), "parquet")
    batch = create(server, body(model, "parquet"), large, large, large)
    server.finish(batch["job_ids"][0])
    server.wait_for(batch["job_ids"][1], "job.started")
    response = server.client.delete(batch["links"]["self"])
    assert response.status_code == 202
    assert response.json()["counts"]["cancelled"] >= 2
    assert response.json()["status"] in ("cancelling", "ended")
    done = finish(server, batch)
    assert (done["counts"]["succeeded"], done["counts"]["cancelled"]) == (1, 3)
    started = [e["index"] for e in follow(server, batch) if e["type"] == "job.started"]
    assert started == [0, 1], "a lane that gets free by the cancel starts none of the others"
    again = server.client.delete(batch["links"]["self"])
    assert (again.status_code, again.json()) == (200, done)
    for job_id in batch["job_ids"][1:]:
        assert server.leftovers(job_id) == []


def test_purging_deletes_the_batch_with_all_its_jobs(server: Server, model: Path, model_root: Path) -> None:
    batch = finish(server, create(server, body(model, "parquet"), body(model, "parquet")))
    assert server.leftovers(batch["job_ids"][0])
    response = server.client.delete(batch["links"]["self"], params={"purge": "true"})
    assert (response.status_code, response.content) == (204, b"")
    for address in (batch["links"]["self"], batch["links"]["events"], *(f"/v1/jobs/{id_}" for id_ in batch["job_ids"])):
        assert server.client.get(address).status_code == 404
    assert [path for job_id in batch["job_ids"] for path in server.leftovers(job_id)] == []

    open_batch = create(server, body(large_model(model_root), "parquet"))
    response = server.client.delete(open_batch["links"]["self"], params={"purge": "true"})
    assert (response.status_code, response.json()["code"]) == (409, "job_not_terminal")
    server.client.delete(open_batch["links"]["self"])
    finish(server, open_batch)


def test_an_item_that_was_purged_is_missing_and_nothing_else(server: Server, model: Path) -> None:
    batch = finish(server, create(server, body(model, "parquet"), body(model, "parquet")))
    server.client.delete(f"/v1/jobs/{batch['job_ids'][0]}", params={"purge": "true"})
    rest = server.client.get(batch["links"]["self"]).json()
    assert (rest["counts"]["total"], rest["counts"]["succeeded"]) == (2, 1)
    assert {e["index"] for e in follow(server, batch)} == {1}
    server.client.delete(batch["links"]["self"], params={"purge": "true"})
    assert server.client.get(batch["links"]["self"]).status_code == 404


def test_an_unknown_batch_is_404_everywhere(server: Server) -> None:
    for method, end in (("GET", ""), ("GET", "/events"), ("DELETE", ""), ("DELETE", "?purge=true")):
        response = server.client.request(method, f"/v1/batches/batch_none{end}")
        assert (response.status_code, response.json()["code"]) == (404, "not_found")


def test_a_batch_that_is_known_already_is_not_sent_again(server: Server, ended: Json) -> None:
    etag = server.client.get(ended["links"]["self"]).headers["etag"]
    assert server.client.get(ended["links"]["self"], headers={"If-None-Match": etag}).status_code == 304


def test_waiting_at_creation_answers_when_all_have_ended(server: Server, model: Path) -> None:
    response = server.client.post(
        "/v1/batches", json={"items": [body(model, "parquet")] * 3}, headers={"Prefer": "wait=60"}
    )
    assert (response.status_code, response.headers["preference-applied"]) == (202, "wait=60")
    assert (response.json()["status"], response.json()["counts"]["succeeded"]) == ("ended", 3)


def test_what_is_answered_fits_the_document(server: Server, ended: Json) -> None:
    document = server.client.get("/openapi.json").json()

    def check(name: str, answer: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        Draft202012Validator(schema).validate(answer)

    check("Batch", ended)
    check("BatchPage", server.client.get("/v1/batches").json())
    check("EventPage", server.client.get(ended["links"]["events"], headers=LOG).json())


def test_a_drained_server_ends_the_stream_and_the_next_one_goes_on(start_server: StartServer, model_root: Path) -> None:
    server = start_server(max_running_jobs=1)
    batch = create(server, *[body(large_model(model_root), "parquet")] * 2)
    seen: list[Json] = []
    with stream(server, batch) as events:
        for event in events:
            seen.append(event)
            if event["type"] == "job.progress" and server.is_running:
                server.process.terminate()
    assert seen[-1].keys() == {"type", "batch_id", "at"}
    assert (seen[-1]["type"], seen[-1]["batch_id"]) == ("server.draining", batch["id"])
    assert server.process.wait(30) == 0
    server.client.close()
    server.start()
    rest = follow(server, batch, seen[-2]["id"])
    ids = [e["id"] for e in seen[:-1] + rest]
    assert ids == sorted(set(ids))
    assert [e["index"] for e in rest if e["type"] == "job.resumed"] == [0]
    assert Counter(e["type"] for e in kept(seen[:-1] + rest))["job.succeeded"] == 2
    assert finish(server, batch)["counts"]["succeeded"] == 2


def test_a_killed_server_loses_no_item_and_tells_nothing_twice(
    start_server: StartServer, model: Path, model_root: Path
) -> None:
    server = start_server(max_running_jobs=2)
    batch = create(server, body(model, "parquet"), *[body(large_model(model_root), "parquet")] * 2)
    server.finish(batch["job_ids"][0])
    server.wait_for(batch["job_ids"][2], "tensor.completed")
    server.kill()
    server.start()
    done = finish(server, batch)
    assert done["counts"]["succeeded"] == 3
    events = follow(server, batch)
    assert [e["id"] for e in events] == sorted({e["id"] for e in events})
    told = [(e["index"], e["name"]) for e in events if e["type"] == "tensor.completed"]
    assert len(told) == len(set(told)) == 6 + 2 * LARGE_TENSORS
    for index, job_id in enumerate(batch["job_ids"]):
        assert [e["type"] for e in events if e["index"] == index] == [e["type"] for e in server.follow(job_id)]
    large = [server.files(job_id) for job_id in batch["job_ids"][1:]]
    assert large[0] == large[1]


def test_whenever_the_server_is_killed_a_batch_is_there_whole_or_not_at_all(
    start_server: StartServer, model: Path
) -> None:
    server = start_server()
    asked = {"items": [body(model, "parquet")] * 100}

    def send(key: str) -> httpx.Response:
        return server.client.post("/v1/batches", json=asked, headers={"Idempotency-Key": key})

    found = []
    for attempt in range(5):
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(send, f"key-{attempt}")
            # A hundred items take some tens of milliseconds: before, within and after the transaction.
            time.sleep(0.02 * attempt)
            server.process.kill()
            with suppress(httpx.TransportError):
                sending.result(30)
        server.kill()
        with closing(sqlite3.connect(server.data_dir / DATABASE)) as db:
            stored = db.execute("SELECT batch_id, count(*) FROM jobs GROUP BY batch_id").fetchall()
            assert {count for _, count in stored} <= {100}
            assert sorted(id_ for id_, _ in stored) == sorted(row[0] for row in db.execute("SELECT id FROM batches"))
            found.append(len(stored) > attempt)
        server.start()
        answer = send(f"key-{attempt}")
        assert answer.status_code == 202, answer.text
        assert ("idempotency-replayed" in answer.headers) == found[-1]
        server.client.delete(answer.headers["location"])
        finish(server, answer.json())
    print(f"whole after the kill: {found}")
    assert len(server.client.get("/v1/batches").json()["data"]) == 5
