"""Progress is true: it grows, it belongs to one job, and a reader who was away misses nothing that counts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import islice, pairwise

import httpx
import pytest

from tests.conftest import StartServer
from tests.scenarios.conftest import NewModel
from tests.server import Json, Server, body

TENSORS = 40
#: So slow that there is something to see.
SLOW = {"backend": "reference", "method": "mse"}


def kept(events: list[Json]) -> list[Json]:
    """The events that can be replayed."""
    return [event for event in events if event["type"] != "job.progress"]


def test_progress_lies_between_nothing_and_all_and_only_grows(server: Server, new_model: NewModel) -> None:
    job_id = server.submit(body(new_model(layers=TENSORS), "parquet", "compressed-tensors", **SLOW))["id"]
    events = server.follow(job_id)
    progress = [event["progress"] for event in events if event["type"] == "job.progress"]
    assert len(progress) >= 5
    for one, next_ in pairwise(progress):
        for growing in ("fraction", "tensors_done", "bytes_done"):
            assert one[growing] <= next_[growing]
    assert all(0 < p["fraction"] < 1 for p in progress)
    assert len({p["fraction"] for p in progress}) >= 5, "it has to move"
    assert {p["tensors_total"] for p in progress} == {TENSORS}
    assert {p["bytes_total"] for p in progress} == {TENSORS * 96 * 256 * 4}
    assert all(p["bytes_done"] <= p["bytes_total"] for p in progress)
    assert progress[0]["stage"] == "quantizing"
    assert {p["stage"] for p in progress} <= {"quantizing", "writing", "hashing"}
    job = server.job(job_id)
    assert job["progress"]["fraction"] == 1
    assert job["progress"]["tensors_done"] == TENSORS


def test_a_running_job_shows_its_progress_to_those_who_ask(start_server: StartServer, new_model: NewModel) -> None:
    server = start_server(max_running_jobs=1, threads=1)
    job_id = server.submit(body(new_model(layers=TENSORS), "parquet", **SLOW))["id"]
    server.wait_for(job_id, "tensor.completed", count=3)
    job = server.job(job_id)
    assert job["status"] == "running"
    assert 0 < job["progress"]["fraction"] < 1
    assert job["started_at"] >= job["created_at"]
    assert "finished_at" not in job
    assert "result" not in job
    assert server.finish(job_id)["progress"]["fraction"] == 1


def test_the_log_of_a_job_tells_its_whole_story_in_order(server: Server, new_model: NewModel) -> None:
    job_id = server.submit(body(new_model(layers=10), "parquet", "compressed-tensors"))["id"]
    events = server.follow(job_id)
    types = [event["type"] for event in kept(events)]
    assert types == ["job.queued", "job.started", *["tensor.completed"] * 20, "job.succeeded"]
    ids = [event["id"] for event in events]
    assert ids == sorted(set(ids))
    times = [datetime.fromisoformat(event["at"]) for event in events]
    assert times == sorted(times)
    assert all(time.utcoffset() is not None and not time.utcoffset() for time in times)
    report = {o["name"]: {t["name"]: t for t in o["tensors"]} for o in server.report(job_id)["outputs"]}
    for event in (e for e in events if e["type"] == "tensor.completed"):
        tensor = report[event["output"]][event["name"]]
        assert event["shape"] == tensor["shape"]
        assert event["scheme"] == tensor["scheme"] == "int4"
        assert event["cosine_similarity"] == tensor["cosine_similarity"]
        assert (event["bytes_in"], event["bytes_out"]) == (tensor["original_bytes"], tensor["stored_bytes"])
    assert events[-1]["job"] == server.job(job_id)


def test_there_are_at_most_ten_progress_events_a_second(server: Server, new_model: NewModel) -> None:
    job_id = server.submit(body(new_model(layers=TENSORS), "parquet", **SLOW))["id"]
    times = [datetime.fromisoformat(e["at"]) for e in server.follow(job_id) if e["type"] == "job.progress"]
    span = (times[-1] - times[0]).total_seconds()
    assert len(times) <= 10 * span + 2


def test_a_stream_that_was_cut_is_resumed_without_gap_or_repeat(server: Server, new_model: NewModel) -> None:
    job_id = server.submit(body(new_model(layers=TENSORS), "parquet", **SLOW))["id"]
    pieces: list[list[Json]] = []
    last: int | None = None
    while not pieces or pieces[-1][-1]["type"] != "job.succeeded":
        with server.stream(job_id, last) as events:
            pieces.append(list(islice(events, 7)))  # then the connection is cut
        last = pieces[-1][-1]["id"]
    together = [event for piece in pieces for event in piece]
    ids = [event["id"] for event in together]
    assert len(pieces) > 5
    assert ids == sorted(set(ids))
    assert kept(together) == server.follow(job_id)


def test_a_finished_job_is_replayed_from_wherever_one_likes(server: Server, new_model: NewModel) -> None:
    job = server.run(body(new_model(layers=8), "parquet"))
    whole = server.follow(job["id"])
    assert all(event["type"] != "job.progress" for event in whole)
    for position, event in enumerate(whole[:-1]):
        assert server.follow(job["id"], event["id"]) == whole[position + 1 :]
    address = f"/v1/jobs/{job['id']}/events"
    behind = server.client.get(address, headers={"Last-Event-ID": str(whole[-1]["id"])})
    assert (behind.status_code, behind.content) == (204, b"")
    assert server.client.get(address, params={"after": whole[-1]["id"]}).status_code == 204


def test_the_log_comes_as_pages_of_json_too(server: Server, new_model: NewModel) -> None:
    job = server.run(body(new_model(layers=8), "parquet"))
    address, headers = f"/v1/jobs/{job['id']}/events", {"Accept": "application/json"}
    pages, after = [], None
    while True:
        params = {"limit": 4} | ({"after": after} if after else {})
        page = server.client.get(address, params=params, headers=headers).json()
        pages.append(page["data"])
        after = page.get("next_cursor")
        if after is None:
            break
    assert [len(page) for page in pages] == [4, 4, 3]
    assert [event for page in pages for event in page] == server.follow(job["id"])


def test_concurrent_streams_tell_of_their_own_jobs_only(server: Server, new_model: NewModel) -> None:
    sizes = (6, 11, 17, 23)
    ids = [server.submit(body(new_model(layers=n), "parquet", **SLOW))["id"] for n in sizes]
    with ThreadPoolExecutor(len(ids)) as pool:
        streams = list(pool.map(server.follow, ids))
    for job_id, size, events in zip(ids, sizes, streams, strict=True):
        assert {event["job_id"] for event in events} == {job_id}
        assert {e["progress"]["tensors_total"] for e in events if e["type"] == "job.progress"} == {size}
        assert sum(event["type"] == "tensor.completed" for event in events) == size


def test_the_stream_begins_with_its_retry_time_and_is_not_to_be_kept(server: Server, new_model: NewModel) -> None:
    job = server.run(body(new_model(layers=1), "parquet"))
    response = server.client.get(f"/v1/jobs/{job['id']}/events", headers={"Accept": "text/event-stream"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.text.startswith("retry: 3000\n\n")


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json", "*/*"])
def test_the_stream_of_an_unknown_job_is_a_problem_before_it_begins(server: Server, accept: str) -> None:
    address = "/v1/jobs/job_00000000-0000-7000-8000-000000000000/events"
    response: httpx.Response = server.client.get(address, headers={"Accept": accept})
    assert (response.status_code, response.json()["code"]) == (404, "not_found")
