"""A cancelled job ends soon, leaves nothing behind and harms no other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import StartServer
from tests.engine.helpers import save, save_folder
from tests.scenarios.conftest import NewModel
from tests.server import Json, Server, body

LARGE_BYTES = 256 << 20
#: The slowest way to compute there is, so that jobs last: NumPy, and a search for each group.
SLOW = {"backend": "reference", "method": "mse", "bit_width": 4}


@pytest.fixture(scope="module")
def large_model(model_root: Path) -> Path:
    """One tensor of many row blocks. It repeats itself: what is in it does not matter here."""
    piece = np.random.default_rng(7).standard_normal((2048, 4096), np.float32)
    repeated = np.tile(piece, (LARGE_BYTES // piece.nbytes, 1))
    return save(model_root / "large" / "model.safetensors", {"huge.weight": repeated}).parent


@pytest.fixture
def one_lane(start_server: StartServer) -> Iterator[Server]:
    """A server on which a second job waits."""
    return start_server(max_running_jobs=1, threads=2, block_bytes=1 << 18)


def slow_model(place: Path, name: str = "slow", layers: int = 60) -> Path:
    """A model that takes seconds when it is computed the slow way."""
    random = np.random.default_rng(3)
    return save_folder(place / name, {f"l.{i:03}.weight": random.normal(size=(128, 512)) for i in range(layers)})


def wait_for_fraction(server: Server, job_id: str, fraction: float) -> None:
    """Until so much is done."""
    with server.stream(job_id) as events:
        assert any(e["type"] == "job.progress" and e["progress"]["fraction"] > fraction for e in events)


def ended(server: Server, job_id: str) -> Json:
    """The job when it has ended; what it shows then is checked as far as it is the same for all cancelled jobs."""
    job = server.finish(job_id)
    assert job["status"] == "cancelled"
    assert "result" not in job
    assert "error" not in job
    assert not server.leftovers(job_id)
    assert server.artifacts(job_id) == []
    events = server.follow(job_id)
    assert events[-1]["type"] == "job.cancelled"
    assert events[-1]["job"]["status"] == "cancelled"
    return job


def test_a_queued_job_is_cancelled_at_once_and_never_starts(one_lane: Server, new_model: NewModel, place: Path) -> None:
    running = one_lane.submit(body(slow_model(place, layers=12), "parquet", **SLOW))["id"]
    one_lane.wait_for(running, "job.started")
    waiting = one_lane.submit(body(new_model(), "parquet"))["id"]
    behind = one_lane.submit(body(new_model(), "parquet"))["id"]
    response = one_lane.cancel(waiting)
    assert (response.status_code, response.json()["status"]) == (202, "cancelled")
    job = ended(one_lane, waiting)
    assert "started_at" not in job
    assert [e["type"] for e in one_lane.follow(waiting)] == ["job.queued", "job.cancelled"]
    assert one_lane.finish(running)["status"] == "succeeded"
    assert one_lane.finish(behind)["status"] == "succeeded"


def test_a_job_in_the_middle_of_a_large_tensor_is_cancelled_long_before_its_end(
    start_server: StartServer, large_model: Path, place: Path, rng: np.random.Generator
) -> None:
    server = start_server()  # as it comes: blocks of 64 MiB, the fastest backend
    server.run(body(slow_model(place, layers=1), "compressed-tensors", "parquet", bit_width=4))  # compiled and warm
    latencies = []
    for _ in range(5):
        baseline = server.anonymous_bytes()
        job_id = server.submit(body(large_model, "compressed-tensors", "parquet", bit_width=4))["id"]
        wait_for_fraction(server, job_id, 0.01)
        time.sleep(rng.uniform(0, 0.5))  # any moment, not just the one behind a block
        begun = time.monotonic()
        assert server.cancel(job_id).status_code == 202
        while server.job(job_id)["status"] != "cancelled" or server.leftovers(job_id):
            time.sleep(0.002)
        latencies.append(time.monotonic() - begun)
        job = ended(server, job_id)
        assert job["progress"]["fraction"] < 1
        assert "tensor.completed" not in {e["type"] for e in server.follow(job_id)}, "it ran to the tensor's end"
        assert server.anonymous_bytes() < baseline + (32 << 20), "its memory is not back"
    print(f"cancelled within {statistics.median(latencies) * 1000:.0f} ms (median), {latencies}")


def test_a_job_of_many_tensors_stops_between_them(one_lane: Server, place: Path) -> None:
    job_id = one_lane.submit(body(slow_model(place), "parquet", **SLOW))["id"]
    one_lane.wait_for(job_id, "tensor.completed", count=3)
    assert one_lane.cancel(job_id).json()["status"] == "cancelling"
    ended(one_lane, job_id)
    done = sum(e["type"] == "tensor.completed" for e in one_lane.follow(job_id))
    assert 3 <= done < 30, "it went on as if nothing had happened"


def test_cancelling_twice_is_as_good_as_once(one_lane: Server, place: Path) -> None:
    job_id = one_lane.submit(body(slow_model(place), "parquet", **SLOW))["id"]
    one_lane.wait_for(job_id, "job.started")
    first, second = one_lane.cancel(job_id), one_lane.cancel(job_id)
    assert first.status_code == 202
    assert second.status_code in (200, 202)
    assert {first.json()["status"], second.json()["status"]} <= {"cancelling", "cancelled"}
    job = ended(one_lane, job_id)
    third = one_lane.cancel(job_id)
    assert (third.status_code, third.json()) == (200, job)
    assert [e["type"] for e in one_lane.follow(job_id)].count("job.cancelled") == 1


def test_a_job_that_succeeded_is_not_changed_by_a_cancel(server: Server, new_model: NewModel) -> None:
    job = server.run(body(new_model(), "parquet"))
    files = server.files(job["id"])
    response = server.cancel(job["id"])
    assert (response.status_code, response.json()) == (200, job)
    assert server.job(job["id"]) == job
    assert server.files(job["id"]) == files


def test_others_are_not_harmed_by_a_cancel(start_server: StartServer, place: Path) -> None:
    server = start_server(max_running_jobs=3, threads=2, block_bytes=1 << 18)
    asked = body(slow_model(place, "other", layers=10), "compressed-tensors", "parquet", **SLOW)
    undisturbed = server.files(server.run(asked)["id"])
    victim = server.submit(body(slow_model(place), "parquet", **SLOW))["id"]
    others = [server.submit(asked)["id"] for _ in range(3)]  # two run beside it, one waits
    server.wait_for(others[0], "tensor.completed")
    server.cancel(victim)
    ended(server, victim)
    for job_id in others:
        assert server.finish(job_id)["status"] == "succeeded"
        assert server.files(job_id) == undisturbed
        assert [e["type"] for e in server.follow(job_id)].count("tensor.completed") == 2 * 10


def test_nothing_appears_where_a_cancelled_job_was_to_write(one_lane: Server, place: Path) -> None:
    model, target = slow_model(place), place / "target"
    before = sorted(place.rglob("*"))
    outputs = [{"format": "parquet", "uri": target.as_uri()}, "compressed-tensors"]
    job_id = one_lane.submit(body(model, *outputs, **SLOW))["id"]
    one_lane.wait_for(job_id, "tensor.completed")
    one_lane.cancel(job_id)
    ended(one_lane, job_id)
    assert sorted(place.rglob("*")) == before
    again = one_lane.submit(body(model, *outputs, **SLOW))  # the address is free again
    one_lane.cancel(again["id"])
    ended(one_lane, again["id"])


def test_a_cancelled_job_can_be_purged_and_a_running_one_cannot(one_lane: Server, place: Path) -> None:
    job_id = one_lane.submit(body(slow_model(place), "parquet", **SLOW))["id"]
    one_lane.wait_for(job_id, "job.started")
    refused = one_lane.client.delete(f"/v1/jobs/{job_id}", params={"purge": "true"})
    assert (refused.status_code, refused.json()["code"]) == (409, "job_not_terminal")
    one_lane.cancel(job_id)
    ended(one_lane, job_id)
    assert one_lane.client.delete(f"/v1/jobs/{job_id}", params={"purge": "true"}).status_code == 204
    for path in ("", "/events", "/report", "/artifacts"):
        response = one_lane.client.get(f"/v1/jobs/{job_id}{path}")
        assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert one_lane.cancel(job_id).status_code == 404
