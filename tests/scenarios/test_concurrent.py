"""Many jobs at once: each gets what it asked for, as if it were alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import StartServer
from tests.engine.helpers import save, save_folder
from tests.scenarios.conftest import NewModel, Weights
from tests.scenarios.readers import check_figures, read_parquet
from tests.server import Json, Server, body

#: Widths, kinds and formats that share nothing but the server.
MIXED: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("parquet",), {"bit_width": 2, "min_accuracy": 0}),
    (("compressed-tensors",), {"bit_width": 3, "granularity": "channel"}),
    (("parquet", "compressed-tensors"), {"bit_width": 4, "group_size": 32}),
    (("compressed-tensors",), {"bit_width": 5, "symmetric": True}),
    (("parquet",), {"bit_width": 6, "method": "minmax"}),
    (("compressed-tensors",), {"bit_width": 8, "granularity": "tensor"}),
    (("parquet",), {"scheme": "nf4", "group_size": 64}),
    (("parquet",), {"bit_width": 4, "backend": "reference"}),
]


def submit_together(server: Server, asked: list[Json]) -> list[str]:
    """The ids of jobs that were posted at the same time, in the order of `asked`."""
    with ThreadPoolExecutor(16) as pool:
        return [job["id"] for job in pool.map(server.submit, asked)]


def test_fifty_jobs_at_once_each_quantize_their_own_model(
    server: Server, place: Path, weights: Weights, tmp_path: Path
) -> None:
    models = [{f"m{i}.{k}.weight": weights(64, 128) for k in range(2)} for i in range(50)]
    folders = [save_folder(place / f"model-{i}", tensors) for i, tensors in enumerate(models)]
    ids = submit_together(server, [body(folder, "parquet") for folder in folders])
    assert len(set(ids)) == 50
    for number, job_id in enumerate(ids):
        job = server.finish(job_id)
        assert job["status"] == "succeeded", job
        assert job["request"]["source"]["uri"] == folders[number].as_uri()
        server.download(job_id, tmp_path / job_id)
        report = server.report(job_id)["outputs"][0]
        check_figures(report, models[number], read_parquet(tmp_path / job_id / "parquet"))
    listed = server.client.get("/v1/jobs", params={"limit": 50}).json()["data"]
    assert [job["id"] for job in listed] == sorted(ids, reverse=True), "newest first"


def test_mixed_configurations_at_once_give_the_bytes_of_a_sequential_run(server: Server, new_model: NewModel) -> None:
    models = [new_model(layers=2 + i % 3) for i in range(len(MIXED))]
    asked = [body(model, *outputs, **config) for model, (outputs, config) in zip(models, MIXED, strict=True)]
    alone = [server.files(server.run(one)["id"]) for one in asked]
    together = submit_together(server, asked * 3)
    for number, job_id in enumerate(together):
        job = server.finish(job_id)
        assert job["status"] == "succeeded", job
        assert server.files(job_id) == alone[number % len(asked)], MIXED[number % len(asked)]


def test_the_same_model_quantized_many_times_at_once_gives_the_same_bytes(server: Server, new_model: NewModel) -> None:
    asked = body(new_model(), "compressed-tensors", "parquet")
    ids = submit_together(server, [asked] * 8)
    assert all(server.finish(job_id)["status"] == "succeeded" for job_id in ids)
    first, *others = (server.files(job_id) for job_id in ids)
    assert all(files == first for files in others)


def test_one_job_fails_alone(server: Server, new_model: NewModel, place: Path, weights: Weights) -> None:
    broken = weights(64, 128)
    broken[11, 7] = np.nan
    folder = save(place / "broken" / "model.safetensors", {"good.weight": weights(64, 128), "bad.weight": broken})
    asked = [body(new_model(), "parquet") for _ in range(9)]
    asked.insert(4, body(folder, "parquet"))
    ids = submit_together(server, asked)
    jobs = [server.finish(job_id) for job_id in ids]
    assert [job["status"] for job in jobs] == ["succeeded"] * 4 + ["failed"] + ["succeeded"] * 5
    assert (jobs[4]["error"]["code"], jobs[4]["error"]["tensor"]) == ("non_finite_weights", "bad.weight")
    assert not server.leftovers(ids[4])
    assert all(server.files(job_id) for job_id in ids[:4] + ids[5:])


def test_streams_of_concurrent_jobs_are_never_mixed(server: Server, place: Path, weights: Weights) -> None:
    ids = []
    for number in range(6):
        tensors = {f"job{number}.{k:02}.weight": weights(64, 128) for k in range(20)}
        ids.append(server.submit(body(save_folder(place / f"m{number}", tensors), "parquet"))["id"])
    with ThreadPoolExecutor(12) as pool:
        streams = list(pool.map(server.follow, ids * 2))
    for number, events in enumerate(streams):
        own = number % 6
        assert {event["job_id"] for event in events} == {ids[own]}
        names = [event["name"] for event in events if event["type"] == "tensor.completed"]
        assert names == [f"job{own}.{k:02}.weight" for k in range(20)]
        assert [e["id"] for e in events] == sorted({e["id"] for e in events})
        assert events[-1]["type"] == "job.succeeded"


def test_every_reader_of_a_job_sees_the_same_events(server: Server, new_model: NewModel) -> None:
    job_id = server.submit(body(new_model(layers=30), "parquet"))["id"]
    with ThreadPoolExecutor(8) as pool:
        streams = list(pool.map(server.follow, [job_id] * 8))
    kept = [[event for event in stream if event["type"] != "job.progress"] for stream in streams]
    assert all(events == kept[0] for events in kept)
    assert len(kept[0]) == 30 + 3


def test_no_more_jobs_run_than_there_are_lanes_and_the_most_urgent_goes_first(
    start_server: StartServer, new_model: NewModel
) -> None:
    server = start_server(max_running_jobs=1, threads=1)
    slow = body(new_model(layers=12), "parquet", backend="reference")
    first = server.submit(slow | {"priority": 100})["id"]
    server.wait_for(first, "job.started")
    quick = body(new_model(layers=1), "parquet")
    ids = {priority: server.submit(quick | {"priority": priority})["id"] for priority in (0, -5, 10, 3)}
    states = [job["status"] for job in server.client.get("/v1/jobs").json()["data"]]
    assert states.count("running") <= 1
    jobs = {priority: server.finish(job_id) for priority, job_id in ids.items()}
    begun = sorted(jobs, key=lambda priority: jobs[priority]["started_at"])
    assert begun == [10, 3, 0, -5]
    spans = sorted((job["started_at"], job["finished_at"]) for job in [*jobs.values(), server.finish(first)])
    assert all(one[1] <= other[0] for one, other in pairwise(spans)), "one lane, one job at a time"


def test_two_jobs_cannot_write_to_the_same_address(start_server: StartServer, new_model: NewModel, place: Path) -> None:
    server = start_server(max_running_jobs=1, threads=1)
    output = {"format": "parquet", "uri": (place / "target").as_uri()}
    one = server.submit(body(new_model(layers=12), output, backend="reference"))["id"]
    other = server.client.post("/v1/jobs", json=body(new_model(), output))
    assert (other.status_code, other.json()["code"]) == (409, "target_in_use")
    both = server.client.post("/v1/jobs", json=body(new_model(), {"format": "parquet", "name": "p"}, output))
    assert (both.status_code, [e["pointer"] for e in both.json()["errors"]]) == (409, ["/outputs/1/uri"])
    inside = {"format": "parquet", "uri": (place / "target" / "below").as_uri()}
    assert server.client.post("/v1/jobs", json=body(new_model(), inside)).status_code == 422, "it has no folder yet"
    assert server.finish(one)["status"] == "succeeded"
