"""Who gets a lane when: long jobs make room for short ones, tenants share, what does not fit waits or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.keyed import Keyed
from tests.conftest import StartServer
from tests.scenarios.conftest import NewModel
from tests.server import TERMINAL, Json, Server, body, validation

SLOW = {"backend": "reference", "method": "mse"}
JSON = {"Accept": "application/json"}
MIB = 1 << 20


@pytest.fixture(scope="module")
def one_lane(tmp_path_factory: pytest.TempPathFactory, model_root: Path) -> Iterator[Server]:
    """A server with one lane, which a test leaves empty."""
    running = Server(tmp_path_factory.mktemp("lane") / "data", [model_root], max_running_jobs=1, threads=1).start()
    yield running
    running.stop()
    assert "Traceback" not in running.log, running.log_end


@pytest.fixture
def long(new_model: NewModel) -> Json:
    """A job of many minutes, of small tensors."""
    return body(new_model(layers=1500, shape=(64, 512)), "compressed-tensors", **SLOW)


@pytest.fixture
def some_seconds(new_model: NewModel) -> Json:
    """A job of more seconds than a turn, into both formats."""
    return body(new_model(layers=120, shape=(64, 512)), "compressed-tensors", "parquet", **SLOW)


@pytest.fixture
def short(new_model: NewModel) -> Json:
    """A job of a moment."""
    return body(new_model(layers=1), "parquet")


def at_work(server: Server, asked: Json) -> str:
    """The id of a job that has finished its first tensor."""
    job_id: str = server.submit(asked)["id"]
    server.wait_for(job_id, "tensor.completed")
    return job_id


def end(server: Server, *job_ids: str) -> None:
    """Cancel what is left."""
    for job_id in job_ids:
        server.cancel(job_id)
    for job_id in job_ids:
        assert server.finish(job_id)["status"] in TERMINAL


def check_log(events: list[Json], *, tensors: int, resumed: int = 0) -> None:
    """Turns leave no trace: one start, each tensor once, progress that only grows."""
    types = [event["type"] for event in events if event["type"] != "job.progress"]
    assert types.count("job.started") == 1
    assert types.count("job.resumed") == resumed
    assert types[-1] == "job.succeeded"
    told = [(event["output"], event["name"]) for event in events if event["type"] == "tensor.completed"]
    assert len(told) == len(set(told)) == tensors
    fractions = [event["progress"]["fraction"] for event in events if event["type"] == "job.progress"]
    assert fractions == sorted(fractions)


def test_a_short_job_ends_long_before_the_long_ones_on_all_lanes(
    start_server: StartServer, long: Json, short: Json
) -> None:
    server = start_server(max_running_jobs=2, threads=1)
    ids = [server.submit(long)["id"] for _ in range(3)]
    for job_id in ids:
        server.wait_for(job_id, "tensor.completed")  # with more jobs than lanes they have taken turns
    job = server.run(short)
    assert job["status"] == "succeeded"
    left = [server.job(job_id) for job_id in ids]
    assert all(job["status"] == "running" for job in left)
    assert all(job["progress"]["fraction"] < 0.5 for job in left)
    end(server, *ids)
    assert not any(server.leftovers(job_id) for job_id in ids)


def test_a_job_that_made_room_again_and_again_gives_the_bytes_of_an_undisturbed_one(
    one_lane: Server, some_seconds: Json, short: Json
) -> None:
    undisturbed = one_lane.run(some_seconds)
    job_id = at_work(one_lane, some_seconds)
    with one_lane.stream(job_id) as events:
        others = 0
        while one_lane.job(job_id)["status"] == "running":
            one_lane.run(short)
            others += 1
        log = list(events)
    assert others >= 2, "it would not have made room otherwise"
    assert one_lane.files(job_id) == one_lane.files(undisturbed["id"])
    check_log(log, tensors=2 * 120)
    report, expected = one_lane.report(job_id), one_lane.report(undisturbed["id"])
    assert [o["files"] for o in report["outputs"]] == [o["files"] for o in expected["outputs"]]
    figures = [[t | {"seconds": 0} for o in r["outputs"] for t in o["tensors"]] for r in (report, expected)]
    assert figures[0] == figures[1]


def test_a_validation_makes_room_as_well_and_measures_the_same(
    one_lane: Server, new_model: NewModel, short: Json
) -> None:
    model = new_model(layers=1500, shape=(256, 512))
    asked = validation(model, model, backend="reference")
    job_id = at_work(one_lane, asked)
    urgent = one_lane.run(short | {"priority": 1})
    one_lane.finish(job_id)
    job = one_lane.job(job_id)
    assert job["status"] == "succeeded", job
    assert urgent["finished_at"] < job["finished_at"]
    check_log(one_lane.follow(job_id), tensors=1500)
    report = one_lane.report(job_id)
    names = [tensor["name"] for tensor in report["outputs"][0]["tensors"]]
    assert sorted(names) == sorted(f"blocks.{i:03}.weight" for i in range(1500))


def test_a_job_that_made_room_is_cancelled_and_leaves_nothing(one_lane: Server, long: Json) -> None:
    job_id = at_work(one_lane, long)
    urgent = at_work(one_lane, long | {"priority": 10})
    assert one_lane.job(job_id)["status"] == "running", "it has begun, and will go on"
    assert one_lane.leftovers(job_id)
    assert one_lane.cancel(job_id).status_code == 202
    assert one_lane.finish(job_id)["status"] == "cancelled"
    assert not one_lane.leftovers(job_id)
    assert one_lane.job(urgent)["status"] == "running"
    end(one_lane, urgent)


def test_a_job_that_made_room_goes_on_when_the_server_is_killed(
    start_server: StartServer, some_seconds: Json, long: Json
) -> None:
    server = start_server(max_running_jobs=1, threads=1)
    expected = server.files(server.run(some_seconds)["id"])
    job_id = at_work(server, some_seconds)
    urgent = at_work(server, long | {"priority": 10})
    told = [
        e["name"] for e in server.client.get(f"/v1/jobs/{job_id}/events", headers=JSON).json()["data"] if "name" in e
    ]
    server.kill()
    server.start()
    server.wait_for(urgent, "job.resumed")
    assert server.job(job_id)["status"] == "running"
    end(server, urgent)
    assert server.finish(job_id)["status"] == "succeeded"
    assert server.files(job_id) == expected
    log = server.follow(job_id)
    check_log(log, tensors=2 * 120, resumed=1)
    assert told, "it goes on behind what it had done"
    assert [event["name"] for event in log if "name" in event][: len(told)] == told


def test_a_tenant_with_many_jobs_of_any_priority_does_not_hold_up_another_one(
    tmp_path: Path, model_root: Path, long: Json, short: Json
) -> None:
    keyed = Keyed(Server(tmp_path / "data", [model_root], require_keys=True, max_running_jobs=1, threads=1))
    try:
        many, few = keyed.client("many"), keyed.client("few")
        ids = [many.submit(long | {"priority": priority})["id"] for priority in (0, 0, 100, 100, 100, 100, 100, 100)]
        for _ in range(2):
            few.run(short)
        jobs = [many.get(f"/v1/jobs/{job_id}").json() for job_id in ids]
        assert not any(job["status"] in TERMINAL for job in jobs)
        assert any(job["status"] == "queued" for job in jobs), "it waits for none of them"
        for job_id in ids:
            many.delete(f"/v1/jobs/{job_id}")
    finally:
        keyed.stop()


def test_a_job_that_does_not_begin_in_time_fails_without_a_lane(one_lane: Server, long: Json, short: Json) -> None:
    urgent = at_work(one_lane, long | {"priority": 10})
    job = one_lane.finish(one_lane.submit(short | {"max_pending_s": 0.3})["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "pending_timeout")
    assert job["error"]["status"] == 504
    assert "started_at" not in job
    assert [event["type"] for event in one_lane.follow(job["id"])] == ["job.queued", "job.failed"]
    assert one_lane.job(urgent)["status"] == "running"
    end(one_lane, urgent)
    assert one_lane.run(short | {"max_pending_s": 60})["status"] == "succeeded"
    for wrong in (0, -1, "soon"):
        response = one_lane.client.post("/v1/jobs", json=short | {"max_pending_s": wrong})
        assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/max_pending_s")


def test_a_job_that_needs_more_memory_than_there_is_is_refused_with_the_numbers(
    start_server: StartServer, new_model: NewModel, short: Json
) -> None:
    server = start_server(memory_limit_bytes=48 * MIB, block_bytes=8 * MIB)
    model = new_model(layers=1, shape=(2048, 2048))
    asked = body(model, "compressed-tensors")
    plan = server.client.post("/v1/plans", json=asked).json()
    response = server.client.post("/v1/jobs", json=asked)
    assert (response.status_code, response.json()["code"]) == (422, "exceeds_memory")
    problem = response.json()
    assert problem["tensor"] == "blocks.000.weight"
    for number in (plan["predicted"]["memory_bytes"], 8 * MIB, 48 * MIB):
        assert str(number) in problem["detail"], problem
    items = {"items": [short, asked]}
    refused = server.client.post("/v1/batches", json=items)
    assert (refused.status_code, refused.json()["code"]) == (422, "exceeds_memory")
    assert server.client.get("/v1/jobs").json()["data"] == []
    assert server.run(short)["status"] == "succeeded"


def test_jobs_that_do_not_fit_together_wait_for_each_other(
    start_server: StartServer, new_model: NewModel, short: Json
) -> None:
    asked = body(new_model(layers=12, shape=(1024, 1024)), "compressed-tensors", **SLOW)
    server = start_server(max_running_jobs=3, threads=1, memory_limit_bytes=130 * MIB)
    need = server.client.post("/v1/plans", json=asked).json()["predicted"]["memory_bytes"]
    assert 65 * MIB < need < 90 * MIB
    first = server.submit(asked)["id"]
    server.wait_for(first, "job.progress")
    second = server.submit(asked)["id"]
    assert server.run(short)["status"] == "succeeded", "there is a lane, and room for a small one"
    assert server.job(second)["status"] == "queued"
    server.cancel(first)
    server.wait_for(second, "job.progress")
    end(server, first, second)
