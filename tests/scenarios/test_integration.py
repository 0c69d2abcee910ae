"""The whole story over HTTP, and what restarts, crashes and drains make of it: nothing."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import StartServer
from tests.scenarios.conftest import NewModel
from tests.scenarios.readers import read_compressed_tensors, read_parquet
from tests.server import Json, Server, body, validation

FORMATS = ("compressed-tensors", "parquet")
SLOW = {"backend": "reference", "method": "mse", "bit_width": 4}


def test_the_whole_story_step_by_step(server: Server, new_model: NewModel, tmp_path: Path) -> None:
    client = server.client
    asked = body(new_model(), *FORMATS, bit_width=4) | {"labels": {"story": "whole"}, "timeout_s": 600}

    # Create
    created = client.post("/v1/jobs", json=asked)
    assert created.status_code == 202
    address = created.headers["location"]
    assert address == created.json()["links"]["self"] == f"/v1/jobs/{created.json()['id']}"

    # Wait
    answer = client.get(address, headers={"Prefer": "wait=60"})
    job = answer.json()
    assert job["status"] == "succeeded"
    assert answer.headers["preference-applied"] == "wait=60"
    assert asked.items() <= job["request"].items()
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]

    # Look again
    again = client.get(address)
    assert client.get(address, headers={"If-None-Match": again.headers["etag"]}).status_code == 304
    head = client.head(address)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", again.headers["etag"])
    listed = client.get("/v1/jobs", params={"label": "story:whole", "status": "succeeded", "kind": "quantize"})
    assert [found["id"] for found in listed.json()["data"]] == [job["id"]]

    # The report, three ways
    report = client.get(job["links"]["report"])
    assert client.get(job["links"]["report"], headers={"If-None-Match": report.headers["etag"]}).status_code == 304
    names = [t["name"] for t in report.json()["outputs"][1]["tensors"]]
    for accept, read in (
        ("application/vnd.apache.parquet", lambda raw: pq.read_table(io.BytesIO(raw))),
        ("application/vnd.apache.arrow.stream", lambda raw: pa.ipc.open_stream(raw).read_all()),
    ):
        response = client.get(job["links"]["report"], headers={"Accept": accept}, params={"output": "parquet"})
        assert response.headers["content-type"] == accept
        assert read(response.content)["name"].to_pylist() == names

    # The artifacts
    artifacts = client.get(job["links"]["artifacts"]).json()["data"]
    weights = next(a for a in artifacts if a["path"] == "compressed-tensors/model.safetensors")
    place = f"{job['links']['artifacts']}/{weights['path']}"
    whole = client.get(place)
    assert hashlib.sha256(whole.content).hexdigest() == weights["sha256"]
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["etag"].strip('"') == weights["sha256"]
    assert client.get(place, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304

    # Everything at once
    archive = client.get(job["links"]["archive"])
    assert archive.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        tar.extractall(tmp_path, filter="data")
        packed = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}  # type: ignore[union-attr]
    assert packed == server.files(job["id"])
    assert read_parquet(tmp_path / "parquet").keys() == read_compressed_tensors(tmp_path / FORMATS[0]).keys()

    # Away with it
    assert client.delete(address, params={"purge": "true"}).status_code == 204
    assert client.get(address).status_code == 404
    assert client.get(place).status_code == 404


def test_a_download_can_be_taken_up_where_it_broke(server: Server, new_model: NewModel) -> None:
    job = server.run(body(new_model(), "compressed-tensors"))
    address = f"{job['links']['artifacts']}/compressed-tensors/model.safetensors"
    whole = server.client.get(address)
    size, tag = len(whole.content), whole.headers["etag"]
    pieces = []
    for start in range(0, size, 10_000):
        headers = {"Range": f"bytes={start}-{start + 9_999}", "If-Range": tag}
        piece = server.client.get(address, headers=headers)
        assert piece.status_code == 206
        assert piece.headers["content-range"] == f"bytes {start}-{min(start + 9_999, size - 1)}/{size}"
        assert int(piece.headers["content-length"]) == len(piece.content)
        pieces.append(piece.content)
    assert b"".join(pieces) == whole.content
    assert server.client.get(address, headers={"Range": "bytes=-100"}).content == whole.content[-100:]
    assert server.client.get(address, headers={"Range": "bytes=500-"}).content == whole.content[500:]
    other = server.client.get(address, headers={"Range": "bytes=0-9", "If-Range": '"another"'})
    assert (other.status_code, other.content) == (200, whole.content)
    outside = server.client.get(address, headers={"Range": f"bytes={size}-"})
    assert (outside.status_code, outside.json()["code"]) == (416, "range_not_satisfiable")
    assert outside.headers["content-range"] == f"bytes */{size}"


def test_the_output_of_a_job_feeds_the_next(server: Server, new_model: NewModel) -> None:
    model = new_model()
    made = server.run(body(model, *FORMATS, bit_width=8))
    for output in FORMATS:
        source = {"type": "job", "job_id": made["id"], "output": output}
        response = server.client.post("/v1/jobs", json=validation(model, source), headers={"Prefer": "wait=60"})
        checked = response.json()
        assert (response.status_code, checked["status"]) == (202, "succeeded")
        reported = next(o for o in made["result"]["outputs"] if o["name"] == output)
        assert checked["result"]["cosine_similarity"] == pytest.approx(reported["cosine_similarity"], abs=1e-6)


def test_waiting_ends_with_the_job_or_with_its_time(start_server: StartServer, new_model: NewModel) -> None:
    server = start_server(max_running_jobs=1, threads=1)
    slow = body(new_model(layers=60), "parquet", **SLOW)
    response = server.client.post("/v1/jobs", json=slow, headers={"Prefer": "wait=0"})
    assert response.json()["status"] in ("queued", "running")
    job_id = response.json()["id"]
    response = server.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "respond-async, wait=1"})
    assert response.json()["status"] == "running"
    assert response.headers["preference-applied"] == "wait=1"
    waiting = threading.Thread(target=server.finish, args=(job_id,))
    waiting.start()
    server.cancel(job_id)
    waiting.join()
    assert server.job(job_id)["status"] == "cancelled"


def submit_three(server: Server, model: Path) -> list[str]:
    """One job that has succeeded, one that runs and is in the middle of it, and two that wait."""
    done = server.run(body(model, "parquet", method="minmax"))["id"]
    running = server.submit(body(model, *FORMATS, **SLOW))["id"]
    waiting = [server.submit(body(model, output, bit_width=3))["id"] for output in FORMATS]
    server.wait_for(running, "tensor.completed", count=6)
    return [done, running, *waiting]


def undisturbed(server: Server, model: Path) -> list[dict[str, bytes]]:
    """What the jobs of `submit_three` write when nothing comes between."""
    asked = [body(model, "parquet", method="minmax"), body(model, *FORMATS, **SLOW)]
    asked += [body(model, output, bit_width=3) for output in FORMATS]
    return [server.files(server.run(one)["id"]) for one in asked]


def check_all(server: Server, ids: list[str], expected: list[dict[str, bytes]]) -> None:
    """All jobs succeed, and their artifacts are byte for byte as they should be."""
    for job_id, files in zip(ids, expected, strict=True):
        job = server.finish(job_id)
        assert job["status"] == "succeeded", job
        assert server.files(job_id) == files, "not the bytes of an undisturbed run"
    assert not list((server.data_dir / "work").iterdir())


def check_log(events: list[Json], tensors: int, restarts: int) -> None:
    """Ids grow over all restarts, each of which is told, and no tensor of an output is finished twice."""
    ids = [event["id"] for event in events]
    assert ids == sorted(set(ids))
    types = [event["type"] for event in events]
    assert types[:2] == ["job.queued", "job.started"]
    assert types.count("job.started") == 1
    assert types.count("job.resumed") == restarts
    assert types[-1] == "job.succeeded"
    completed = [(e["output"], e["name"]) for e in events if e["type"] == "tensor.completed"]
    assert len(completed) == len(set(completed)) <= tensors * len(FORMATS)


def test_after_kill_9_queued_jobs_run_and_running_ones_go_on(
    server: Server, start_server: StartServer, new_model: NewModel
) -> None:
    model = new_model(layers=24, shape=(64, 512))
    expected = undisturbed(server, model)
    doomed = start_server(max_running_jobs=1, threads=1)
    ids = submit_three(doomed, model)
    seen = doomed.wait_for(ids[1], "tensor.completed", count=8)
    before = doomed.job(ids[0])
    doomed.kill()
    doomed.start()
    assert doomed.job(ids[0]) == before
    doomed.wait_for(ids[1], "tensor.completed", count=14)
    doomed.kill()
    doomed.start()
    check_all(doomed, ids, expected)
    log = doomed.follow(ids[1])
    check_log(log, 24, restarts=2)
    stored = [event for event in seen if event["type"] != "job.progress"]
    assert log[: len(stored)] == stored, "what a reader has seen is never taken back"
    report = doomed.report(ids[1])
    assert [len(output["tensors"]) for output in report["outputs"]] == [24, 24]


def test_a_reader_goes_on_over_a_crash_with_the_last_id_it_has(start_server: StartServer, new_model: NewModel) -> None:
    server = start_server(max_running_jobs=1, threads=1)
    job_id = server.submit(body(new_model(layers=24, shape=(64, 512)), "parquet", **SLOW))["id"]
    seen = server.wait_for(job_id, "tensor.completed", count=5)
    server.kill()
    server.start()
    rest = server.follow(job_id, seen[-1]["id"])
    together = [event for event in seen + rest if event["type"] != "job.progress"]
    assert together == server.follow(job_id)
    assert "job.resumed" in {event["type"] for event in rest}


def test_sigterm_drains_with_open_streams_and_a_restart_goes_on(
    server: Server, start_server: StartServer, new_model: NewModel
) -> None:
    model = new_model(layers=24, shape=(64, 512))
    expected = undisturbed(server, model)
    drained = start_server(max_running_jobs=1, threads=1, drain_timeout_s=60)
    ids = submit_three(drained, model)
    streams: dict[str, list[Json]] = {}
    open_ = threading.Barrier(len(ids))

    def read(job_id: str) -> None:
        with drained.stream(job_id) as events:
            streams[job_id] = [next(events)]
            open_.wait()
            streams[job_id] += list(events)

    readers = [threading.Thread(target=read, args=(job_id,)) for job_id in ids[1:]]
    for reader in readers:
        reader.start()
    open_.wait()
    seconds = drained.stop()
    for reader in readers:
        reader.join()
    print(f"drained with {len(readers)} open streams in {seconds:.2f} s")
    assert seconds < 30, "it waited for the streams, or for the job's end"
    assert {events[-1]["type"] for events in streams.values()} == {"server.draining"}
    assert all("id" not in events[-1] for events in streams.values())

    drained.start()
    last = max(event["id"] for event in streams[ids[1]] if "id" in event)
    rest = drained.follow(ids[1], last)
    check_all(drained, ids, expected)
    check_log(drained.follow(ids[1]), 24, restarts=1)
    stored = [e for e in streams[ids[1]] + rest if "id" in e and e["type"] != "job.progress"]
    assert stored == drained.follow(ids[1])


def test_a_stopped_server_leaves_its_data_to_the_next_and_two_never_share_it(
    start_server: StartServer, new_model: NewModel
) -> None:
    first = start_server()
    job = first.run(body(new_model(), *FORMATS) | {"labels": {"kept": "yes"}})
    files = first.files(job["id"])
    rival = Server(first.data_dir, [], log_path=first.log_path.with_name("rival.log"))
    with pytest.raises(AssertionError, match="in use by another server"):
        rival.start()
    assert "Traceback" not in rival.log, "a mistake of the operator's is no crash"
    assert first.job(job["id"]) == job
    first.stop()
    second = start_server(data_dir=first.data_dir)
    assert second.job(job["id"]) == job
    assert second.files(job["id"]) == files
    found = second.client.get("/v1/jobs", params={"label": "kept:yes"}).json()["data"]
    assert found == [job]


def test_jobs_can_be_paged_through_while_more_are_added(server: Server, new_model: NewModel) -> None:
    model = new_model(layers=1)
    label = {"labels": {"page": model.parent.name}}
    ids = [server.submit(body(model, "parquet") | label)["id"] for _ in range(11)]
    params: dict[str, str | int] = {"limit": 4, "label": f"page:{model.parent.name}"}
    found: list[str] = []
    while True:
        page = server.client.get("/v1/jobs", params=params).json()
        found += [job["id"] for job in page["data"]]
        if "next_cursor" not in page:
            break
        params["after"] = page["next_cursor"]
        server.submit(body(model, "parquet") | label)
    assert found == ids[::-1]


def test_what_the_server_can_do_is_what_jobs_can_ask_for(server: Server, new_model: NewModel) -> None:
    catalog = {
        name: [entry["id"] for entry in server.client.get(f"/v1/{name}").json()["data"]]
        for name in ("profiles", "schemes", "formats", "backends")
    }
    assert catalog["profiles"] == ["edge", "local", "cloud"]
    writable = [f["id"] for f in server.client.get("/v1/formats").json()["data"] if f["can_write"]]
    assert set(FORMATS) <= set(writable)
    model = new_model(layers=1)
    for scheme in catalog["schemes"]:
        job = server.run(body(model, "parquet", scheme=scheme, min_accuracy=0))
        assert job["config"]["scheme"] == scheme
    assert json.dumps(catalog)
