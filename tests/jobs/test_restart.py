"""A server killed at any moment: what the next one makes of it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.engine.checkpoint import BOOT_ID
from service.jobs.database import Database
from service.jobs.events import TENSOR_COMPLETED
from service.jobs.folders import Folders
from service.jobs.job import Job, Status
from service.jobs.leases import Leases
from service.jobs.manager import JobManager
from service.jobs.orphans import remove_orphans
from service.jobs.request import QuantizeRequest
from service.jobs.store import DATABASE, Store
from tests.jobs.conftest import MakeManager
from tests.jobs.models import (
    digests,
    files_below,
    make_long_model,
    make_model,
    make_slow_model,
    quantize_request,
)

REPOSITORY = Path(__file__).parents[2]
FORMAT = {"format": "compressed-tensors"}


@contextmanager
def child(tmp_path: Path, root: Path, requests: list[QuantizeRequest]) -> Iterator[subprocess.Popen[str]]:
    """A manager in another process; killed at the latest when the block ends."""
    body = json.dumps([request.model_dump(mode="json", exclude_unset=True) for request in requests])
    command = [sys.executable, "-m", "tests.jobs.child", str(tmp_path / "data"), str(root), body]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def until(process: subprocess.Popen[str], type_: str, times: int = 1) -> None:
    """Read events of the first job until one type has come so often."""
    assert process.stdout is not None
    for line in process.stdout:
        times -= line.strip() == type_
        if not times:
            return
    raise AssertionError("the process ended before")


async def test_a_job_killed_in_the_middle_goes_on_and_gives_the_bytes_of_an_undisturbed_one(
    make_manager: MakeManager, tmp_path: Path, root: Path
) -> None:
    model = make_long_model(root / "long.safetensors")
    outputs = [FORMAT, {"format": "parquet"}]
    request = quantize_request(model, outputs=outputs, config={"method": "mse"})
    with child(tmp_path, root, [request, quantize_request(make_model(root / "m.safetensors"))]) as process:
        killed = first_line(process)
        until(process, TENSOR_COMPLETED, times=20)
        process.kill()
    with child(tmp_path, root, []) as process:  # and once more, in the middle of going on
        assert first_line(process) == killed
        until(process, "job.resumed")
        until(process, TENSOR_COMPLETED, times=10)
        process.kill()

    manager = await make_manager()
    done = await manager.jobs.wait(killed, 120)
    assert done.status is Status.SUCCEEDED, done.error
    assert done.started_at is not None
    events = await manager.jobs.events(killed, limit=1000)
    types = [event.type for event in events]
    assert types.count("job.started") == 1
    assert types.count("job.resumed") == 2
    told = [(e.data["output"], e.data["name"]) for e in events if e.type == TENSOR_COMPLETED]
    assert len(told) == len(set(told)) == 80, "each tensor is told once, whenever the process died"
    assert [event.id for event in events] == sorted({event.id for event in events if event.id})
    queued = next(job for job in (await manager.jobs.find())[0] if job.id != killed)
    assert (await manager.jobs.wait(queued.id, 60)).status is Status.SUCCEEDED

    undisturbed = await manager.jobs.wait((await manager.submit(request)).id, 120)
    artifacts = tmp_path / "data" / "artifacts"
    for output in ("compressed-tensors", "parquet"):
        assert digests(artifacts / killed / output) == digests(artifacts / undisturbed.id / output)
    assert [(a.path, a.sha256) for a in done.artifacts] == [(a.path, a.sha256) for a in undisturbed.artifacts]
    assert files_below(tmp_path / "data" / "work") == []


async def test_a_job_killed_while_cancelling_ends_cancelled_and_leaves_nothing(
    make_manager: MakeManager, tmp_path: Path, root: Path
) -> None:
    outputs = [FORMAT, FORMAT | {"name": "b", "uri": (root / "out").as_uri()}]
    model = make_long_model(root / "long.safetensors")
    with child(tmp_path, root, [quantize_request(model, outputs=outputs, config={"method": "mse"})]) as process:
        job_id = first_line(process)
        until(process, TENSOR_COMPLETED)
        process.kill()
    assert files_below(tmp_path / "data" / "work") != []
    # As if a DELETE had come a moment before.
    store = Store(tmp_path / "data")
    running = store.get(job_id)
    assert running is not None
    store.write([running.to(Status.CANCELLING)], [])
    store.close()
    manager = await make_manager()
    done = await manager.jobs.wait(job_id, 10)
    assert done.status is Status.CANCELLED
    assert [event.type for event in await manager.jobs.events(job_id)][-1] == "job.cancelled"
    assert files_below(tmp_path / "data" / "work") + files_below(tmp_path / "data" / "artifacts") == []
    assert files_below(root) == ["long.safetensors"]


async def test_a_job_killed_between_publishing_and_its_last_state_is_finished_and_not_done_again(
    make_manager: MakeManager, tmp_path: Path, root: Path
) -> None:
    request = quantize_request(make_long_model(root / "long.safetensors"))
    with child(tmp_path, root, [request]) as process:
        job_id = first_line(process)
        until(process, "job.started")
        # A writer that holds the database keeps the job's last state from being stored.
        database = sqlite3.connect(tmp_path / "data" / DATABASE, isolation_level=None)
        database.execute("BEGIN IMMEDIATE")
        report = tmp_path / "data" / "artifacts" / job_id / "report.json"
        deadline = time.monotonic() + 60
        while not report.exists() and time.monotonic() < deadline:
            time.sleep(0.01)  # noqa: ASYNC251
        process.kill()
    database.close()
    before = {path: path.stat().st_mtime_ns for path in report.parent.rglob("*")}
    manager = await make_manager()
    done = await manager.jobs.wait(job_id, 60)
    assert done.status is Status.SUCCEEDED, done.error
    assert len(done.artifacts) == 3
    told = [
        event.data["name"] for event in await manager.jobs.events(job_id, limit=1000) if event.type == TENSOR_COMPLETED
    ]
    assert sorted(told) == sorted({f"layers.{i}.weight" for i in range(40)})
    assert {path: path.stat().st_mtime_ns for path in report.parent.rglob("*")} == before


def set_back(data: Path, job: Job, status: Status) -> None:
    """The store as a crash would have left it: the job's end was never written."""
    store = Store(data)
    store.write([replace(job, status=status, finished_at=None, result=None, artifacts=())], [])
    store._db.execute("DELETE FROM events WHERE type = 'job.succeeded'")
    store.close()


@pytest.mark.parametrize("status", [Status.RUNNING, Status.CANCELLING])
@pytest.mark.parametrize("step", ["committed", "first published", "all published", "report published"])
async def test_a_crash_at_any_step_of_publishing_is_gone_on_from(
    make_manager: MakeManager, tmp_path: Path, root: Path, step: str, status: Status
) -> None:
    data, target = tmp_path / "data", root / "out"
    outputs = [FORMAT | {"name": "a", "uri": target.as_uri()}, FORMAT | {"name": "b"}]
    first = await make_manager()
    job = await first.submit(quantize_request(make_model(root / "m.safetensors"), outputs=outputs))
    job = await first.jobs.wait(job.id, 60)
    await first.drain(10)
    artifacts, work = data / "artifacts" / job.id, data / "work" / job.id
    expected = digests(target)
    work.mkdir()
    if step == "committed":
        target.rename(work / "a")
    if step in ("committed", "first published"):
        (artifacts / "b").rename(work / "b")
    if step != "report published":
        (artifacts / "report.json").rename(work / "report.json")
    set_back(data, job, status)

    second = await make_manager()
    done = await second.jobs.wait(job.id, 60)
    assert files_below(data / "work") == []
    if status is Status.CANCELLING:
        assert done.status is Status.CANCELLED
        assert files_below(data / "artifacts") == []
        assert files_below(root) == ["m.safetensors"]
    else:
        assert done.status is Status.SUCCEEDED, done.error
        assert digests(target) == digests(artifacts / "b") == expected
        assert done.artifacts == job.artifacts


async def test_a_target_that_someone_emptied_after_publishing_fails_the_job_and_not_silently(
    make_manager: MakeManager, tmp_path: Path, root: Path
) -> None:
    data, target = tmp_path / "data", root / "out"
    first = await make_manager()
    request = quantize_request(make_model(root / "m.safetensors"), outputs=[FORMAT | {"uri": target.as_uri()}])
    job = await first.jobs.wait((await first.submit(request)).id, 60)
    await first.drain(10)
    target.rename(root / "moved")
    (data / "work" / job.id).mkdir()
    (data / "artifacts" / job.id / "report.json").rename(data / "work" / job.id / "report.json")
    set_back(data, job, Status.RUNNING)
    done = await (await make_manager()).jobs.wait(job.id, 60)
    assert done.error is not None
    assert done.error.code == "storage_failure"
    assert files_below(data / "work") + files_below(data / "artifacts") == []


async def until_gone(path: Path) -> None:
    for _ in range(1000):
        if not await asyncio.to_thread(path.exists):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{path} is still there")


async def test_files_that_belong_to_no_job_are_removed_after_a_start_and_others_kept(
    make_manager: MakeManager, tmp_path: Path, root: Path
) -> None:
    first = await make_manager()
    job = await first.submit(quantize_request(make_model(root / "m.safetensors")))
    await first.jobs.wait(job.id, 60)
    await first.drain(10)
    data = tmp_path / "data"
    kept = digests(data / "artifacts")
    for orphan in (data / "work" / "job_x", data / "work" / job.id, data / "artifacts" / "job_y"):
        (orphan / "deep").mkdir(parents=True)
        (orphan / "deep" / "file").write_bytes(b"x")
    blob = data / "blobs" / "sha256" / "ab" / ("ab" * 32)
    blob.parent.mkdir()
    blob.touch()
    second = await make_manager()
    assert files_below(data / "work") == []
    running = await second.submit(quantize_request(root / "m.safetensors"))
    await until_gone(data / "artifacts" / "job_y")
    await until_gone(blob)
    assert (await second.jobs.wait(running.id, 60)).status is Status.SUCCEEDED
    found = digests(data / "artifacts")
    assert {path: digest for path, digest in found.items() if not path.startswith(running.id)} == kept
    assert len(found) == 2 * len(kept)


async def test_a_look_for_files_of_no_job_leaves_those_of_a_purged_one_to_their_last_reader(
    manager: JobManager, tmp_path: Path, root: Path
) -> None:
    job = await manager.jobs.wait((await manager.submit(quantize_request(make_model(root / "m.safetensors")))).id, 60)
    folders = Folders(tmp_path / "data")
    with ThreadPoolExecutor(1) as thread:
        database = Database(lambda: manager._opened_store, thread)
        with manager.leases.held(job.id):
            await manager.purge(job.id)
            # As another process would, that does not know who reads.
            await remove_orphans(database, folders, Leases(), manager.blobs)
            assert digests(folders.artifacts(job.id))
    await until_gone(folders.artifacts(job.id))


async def test_a_timeout_goes_on_counting_after_a_restart_but_not_while_no_server_was_up(
    make_manager: MakeManager, tmp_path: Path, root: Path
) -> None:
    (tmp_path / "data").mkdir()
    store = Store(tmp_path / "data")
    now = datetime.now(UTC)
    model = make_slow_model(root / "slow.safetensors")
    jobs = {}
    for name, ran_s in (("nearly", 59.9), ("fresh", 1.0)):
        request = quantize_request(model, timeout_s=60, config={"method": "mse"})
        started = now - timedelta(days=1)
        config = {"profile": "local", "bit_width": 4, "method": "mse", "backend": "reference", "group_size": 128}
        job = Job(f"job_{name}", request, config, Status.RUNNING, started, started_at=started)
        store.add(job, [])
        checkpoint = tmp_path / "data" / "work" / job.id / "checkpoint.jsonl"
        checkpoint.parent.mkdir(parents=True)
        boot = BOOT_ID.read_text().strip()
        checkpoint.write_text(f'{{"run": "…", "boot": "{boot}"}}\n{{"seconds": {ran_s}}}\n{{"sec')
        jobs[name] = job
    store.close()
    manager = await make_manager()
    late = await manager.jobs.wait("job_nearly", 60)
    assert late.error is not None
    assert late.error.code == "job_timeout"
    assert (await manager.jobs.get("job_fresh")).status is Status.RUNNING
    await manager.cancel("job_fresh")


@pytest.mark.parametrize("priority", [0, 100])
async def test_a_restart_does_not_change_who_has_the_better_claim(
    make_manager: MakeManager, tmp_path: Path, root: Path, priority: int
) -> None:
    slow = quantize_request(make_long_model(root / "long.safetensors"), config={"method": "mse"})
    other = quantize_request(make_model(root / "m.safetensors"), priority=priority)
    with child(tmp_path, root, [slow, other]) as process:
        running = first_line(process)
        until(process, TENSOR_COMPLETED)
        process.kill()
    manager = await make_manager(max_running_jobs=1)
    assert (await manager.jobs.get(running)).status is Status.RUNNING
    waiting = next(job for job in (await manager.jobs.find())[0] if job.id != running)
    first, second = await manager.jobs.wait(running, 60), await manager.jobs.wait(waiting.id, 60)
    assert (first.status, second.status) == (Status.SUCCEEDED, Status.SUCCEEDED)
    resumed = [event.at for event in await manager.jobs.events(running, limit=1000) if event.type == "job.resumed"]
    assert len(resumed) == 1, "however many turns it took"
    assert second.started_at is not None
    assert (resumed[0] < second.started_at) == (priority == 0)
