"""What jobs use they give back, and what there is not enough of is refused politely."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import StartServer
from tests.engine.helpers import save
from tests.scenarios.conftest import NewModel, Weights
from tests.server import Server, body, validation

SLOW = {"backend": "reference", "method": "mse"}
MIB = 1 << 20


def settles(value: Callable[[], int], limit: int) -> int:
    """The value as soon as it is down to the limit, or what it is after a while."""
    for _ in range(100):
        if value() <= limit:
            break
        time.sleep(0.1)
    return value()


@contextmanager
def peak_of(value: Callable[[], int]) -> Iterator[list[int]]:
    """Looks at a value all the time; its largest is in the list at the end."""
    peak, done = [value()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], value())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def one_round(server: Server, model: Path, broken: Path) -> list[str]:
    """Ten jobs of all sorts, with readers; all have ended."""
    good = body(model, "compressed-tensors", "parquet")
    ids = [server.submit(good)["id"] for _ in range(6)]
    ids.append(server.submit(body(broken, "parquet"))["id"])
    ids.append(server.submit(validation(model, model))["id"])
    ids.append(server.submit(good)["id"])
    server.cancel(ids[-1])
    with server.stream(ids[0]) as events:
        next(events)  # a reader that goes in the middle
    server.follow(ids[1])
    for job_id in ids:
        server.finish(job_id)
    ids.append(server.run(good | {"labels": {"last": "yes"}})["id"])
    server.files(ids[-1])
    assert server.client.get(f"/v1/jobs/{ids[-1]}/archive").status_code == 200
    return ids


def test_after_a_hundred_jobs_memory_files_and_threads_are_back_at_the_baseline(
    start_server: StartServer, new_model: NewModel, weights: Weights
) -> None:
    server = start_server(threads=2)
    model = new_model(layers=4, shape=(256, 1024))
    sick = weights(64, 256)
    sick[0, 0] = np.nan
    broken = new_model({"a.weight": weights(256, 1024), "sick.weight": sick})
    ids = [job_id for _ in range(2) for job_id in one_round(server, model, broken)]
    files, threads, memory = server.open_files(), server.threads(), server.anonymous_bytes()
    for _ in range(10):
        ids += one_round(server, model, broken)
    assert settles(server.open_files, files) <= files
    # Pools grow to their bound as calls coincide; a thread kept for each job would make a hundred.
    assert settles(server.threads, threads) <= threads + 8
    after = settles(server.anonymous_bytes, memory + 8 * MIB)
    print(f"anonymous memory {memory / MIB:.1f} MiB before a hundred jobs, {after / MIB:.1f} MiB after")
    assert after <= memory + 8 * MIB, "each of them moved 8 MiB"
    states = [server.job(job_id)["status"] for job_id in ids]
    assert states.count("failed") == 12
    assert states.count("succeeded") >= 12 * 8


def test_the_disk_holds_artifacts_of_successes_and_nothing_else_and_a_purge_empties_it(
    start_server: StartServer, new_model: NewModel, weights: Weights
) -> None:
    server = start_server()
    model, sick = new_model(), weights(64, 256)
    sick[5, 5] = np.inf
    ids = one_round(server, model, new_model({"sick.weight": sick}))
    data = server.data_dir
    assert not list((data / "work").iterdir())
    kept = {path.name for path in (data / "artifacts").iterdir()}
    assert kept == {job_id for job_id in ids if server.job(job_id)["status"] == "succeeded"}
    for job_id in ids:
        assert server.client.delete(f"/v1/jobs/{job_id}", params={"purge": "true"}).status_code == 204
    assert not list((data / "artifacts").iterdir())
    assert server.client.get("/v1/jobs").json()["data"] == []
    assert not [path for job_id in ids for path in server.leftovers(job_id)]


def test_a_full_queue_answers_429_and_takes_jobs_again_later(start_server: StartServer, new_model: NewModel) -> None:
    server = start_server(max_running_jobs=1, max_queued_jobs=2, threads=1)
    slow = server.submit(body(new_model(layers=20), "parquet", **SLOW))["id"]
    server.wait_for(slow, "job.started")
    asked = body(new_model(layers=1), "parquet")
    waiting = [server.submit(asked)["id"] for _ in range(2)]
    response = server.client.post("/v1/jobs", json=asked)
    assert (response.status_code, response.json()["code"]) == (429, "queue_full")
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["content-type"] == "application/problem+json"
    server.cancel(waiting[0])
    waiting[0] = server.submit(asked)["id"]
    for job_id in [slow, *waiting]:
        assert server.finish(job_id)["status"] == "succeeded"
    assert server.run(asked)["status"] == "succeeded"
    assert len(server.client.get("/v1/jobs").json()["data"]) == 5, "what was refused is no job"


def test_a_job_that_takes_longer_than_it_may_fails_and_leaves_nothing(
    start_server: StartServer, new_model: NewModel, place: Path
) -> None:
    server = start_server(max_running_jobs=1, threads=1)
    target = {"format": "parquet", "uri": (place / "target").as_uri()}
    asked = body(new_model(layers=400), "compressed-tensors", target, **SLOW) | {"timeout_s": 0.3}
    job_id = server.submit(asked)["id"]
    job = server.finish(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "job_timeout")
    assert "0.3" in job["error"]["detail"]
    assert sum(e["type"] == "tensor.completed" for e in server.follow(job_id)) < 400, "it ran to its end"
    assert not server.leftovers(job_id)
    assert not (place / "target").exists()
    assert server.run(body(new_model(), "parquet") | {"timeout_s": 3600})["status"] == "succeeded"


def test_memory_follows_the_block_and_not_the_tensor(start_server: StartServer, model_root: Path) -> None:
    block, tensor = 4 * MIB, 256 * MIB
    server = start_server(block_bytes=block, threads=2, max_running_jobs=1)
    folder = model_root / "tall"
    piece = np.random.default_rng(1).standard_normal((1024, 4096), np.float32)
    save(folder / "model.safetensors", {"tall.weight": np.tile(piece, (tensor // piece.nbytes, 1))})
    for granularity in ("group", "tensor"):
        asked = body(folder, "compressed-tensors", "parquet", granularity=granularity, method="minmax")
        server.run(body(folder, "parquet", method="minmax", skip=["*"]))
        baseline = server.anonymous_bytes()
        with peak_of(server.anonymous_bytes) as peak:
            server.run(asked)
        used = peak[0] - baseline
        print(
            f"{granularity}: {used / MIB:.0f} MiB for a tensor of {tensor // MIB} MiB in blocks of {block // MIB} MiB"
        )
        # Beside the blocks, a row group of the Parquet file is made in memory.
        assert used < tensor * 3 // 4
    for path in folder.iterdir():
        path.unlink()


def test_a_reader_that_never_reads_holds_up_neither_the_job_nor_others(
    start_server: StartServer, new_model: NewModel
) -> None:
    server = start_server(max_running_jobs=1)
    job_id = server.submit(body(new_model(layers=200, shape=(32, 128)), "parquet", "compressed-tensors"))["id"]
    port = server.client.base_url.port
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect(("127.0.0.1", port))
        deaf.sendall(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        events = server.follow(job_id)
        assert events[-1]["type"] == "job.succeeded"
        assert sum(event["type"] == "tensor.completed" for event in events) == 400
        assert server.client.get("/healthz").status_code == 200


def test_the_loop_stays_free_while_a_large_job_runs(start_server: StartServer, new_model: NewModel) -> None:
    server = start_server(threads=2)
    job_id = server.submit(body(new_model(layers=30, shape=(512, 1024)), "parquet", "compressed-tensors"))["id"]
    answers = 0
    while server.job(job_id)["status"] not in ("succeeded", "failed"):
        answers += 1
        time.sleep(0.005)
    stall_s = server.client.get("/readyz").json()["longest_stall_s"]
    print(f"{answers} answers while the job ran, longest stall of the loop since the start {stall_s * 1000:.1f} ms")
    assert answers >= 5, "calls were answered while it ran"


@pytest.mark.parametrize("size", [1 << 20, 80 << 20], ids=["a MiB", "80 MiB"])
def test_a_body_beyond_all_measure_is_refused(server: Server, size: int) -> None:
    headers = {"Content-Type": "application/json"}
    response = server.client.post("/v1/jobs", content=b'{"kind": "' + b"x" * size + b'"}', headers=headers)
    assert response.status_code in (413, 422)
    assert len(response.content) < 10_000, "it is not sent back"
    assert server.client.get("/healthz").status_code == 200
