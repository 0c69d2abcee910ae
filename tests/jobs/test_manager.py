"""The manager with the real engine: what clients may rely on, and that nothing is left of what failed."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from service.engine.backends.registry import backends
from service.engine.config import QuantizationConfig
from service.errors import (
    Draining,
    ForbiddenPath,
    InvalidConfig,
    ModelNotFound,
    NotFinished,
    NotFound,
    NotTerminal,
    PickledWeights,
    QueueFull,
    TargetInUse,
    UnsupportedByFormat,
)
from service.jobs.events import SERVER_DRAINING, TENSOR_COMPLETED, Event
from service.jobs.folders import Folders
from service.jobs.job import Job, Status
from service.jobs.manager import JobManager
from service.jobs.publisher import Publisher
from service.storage.store_options import StoreOptions
from service.storage.stores import Stores
from tests.jobs.conftest import MakeManager
from tests.jobs.models import (
    digests,
    files_below,
    make_long_model,
    make_model,
    make_slow_model,
    quantize_request,
    validate_request,
)

SLOW = {"config": {"method": "mse"}}

#: Starts a manager and tells in which threads it loads the compiler.
WARM_UP = """
import asyncio, gc, json, sys, threading
from pathlib import Path
from service.engine.config import QuantizationConfig
from service.jobs.manager import JobManager

threads = set()
def hear(event, args):
    if event == "import" and args[0] == "numba":
        threads.add(threading.current_thread().name)
sys.addaudithook(hear)

async def main():
    defaults = QuantizationConfig(backend="cpu")
    manager = JobManager(data_dir=Path(sys.argv[1]), model_roots=[], config_defaults=defaults)
    await manager.start()
    while not manager.is_warm:
        await asyncio.sleep(0.05)
    fault = manager.warm_up_fault
    await manager.drain(10)
    assert fault is None, fault

asyncio.run(main())
json.dump({"threads": sorted(threads), "spared": gc.get_freeze_count() > 100_000}, sys.stdout)
"""


async def all_events(manager: JobManager, job: Job) -> list[Event]:
    return [item async for item in manager.jobs.follow(job.id) if isinstance(item, Event)]


async def until_running(manager: JobManager, job: Job) -> None:
    """Until its first progress: the engine is at work."""
    async for item in manager.jobs.follow(job.id):
        if isinstance(item, Event) and item.type == "job.progress":
            return


def left_over(tmp_path: Path) -> list[str]:
    return files_below(tmp_path / "data" / "work") + files_below(tmp_path / "data" / "artifacts")


async def test_a_job_runs_from_queued_to_succeeded_and_its_files_are_what_it_says(
    manager: JobManager, root: Path, tmp_path: Path
) -> None:
    job = await manager.submit(quantize_request(make_model(root / "m.safetensors"), labels={"a": "b"}))
    assert job.status is Status.QUEUED
    assert job.config["bit_width"] == 4
    events = await all_events(manager, job)
    stored = [event.type for event in events if event.is_stored]
    assert stored == ["job.queued", "job.started", *[TENSOR_COMPLETED] * 4, "job.succeeded"]
    assert events[0].data == {"status": "queued", "queue_position": 0}
    done = await manager.jobs.get(job.id)
    assert events[-1].job == done
    assert done.result is not None
    assert done.result["passed"]
    folder = tmp_path / "data" / "artifacts" / job.id / "compressed-tensors"
    found = digests(folder)
    assert {artifact.path: artifact.sha256 for artifact in done.artifacts} == {
        f"compressed-tensors/{path}": digest for path, digest in found.items()
    }
    assert {Path(artifact.location) for artifact in done.artifacts} == {folder / path for path in found}
    assert (await manager.jobs.report(job.id)).result() == done.result
    assert files_below(tmp_path / "data" / "work") == []
    assert (await manager.jobs.find(label=("a", "b")))[0] == [done]


async def test_an_output_of_a_job_can_be_validated_against_its_source(
    manager: JobManager, root: Path, tmp_path: Path
) -> None:
    model = make_model(root / "m.safetensors")
    job = await manager.submit(quantize_request(model))
    await manager.jobs.wait(job.id, 60)
    check = await manager.submit(validate_request(model, job.id, config={"min_accuracy": 0.9}))
    done = await manager.jobs.wait(check.id, 60)
    assert done.status is Status.SUCCEEDED, done.error
    assert done.artifacts == ()
    assert done.result is not None
    assert done.result["cosine_similarity"] > 0.98
    assert files_below(tmp_path / "data" / "artifacts" / check.id) == ["report.json"]


async def test_jobs_that_run_beside_each_other_give_the_bytes_of_jobs_run_alone(
    make_manager: MakeManager, root: Path, tmp_path: Path
) -> None:
    model = make_model(root / "m.safetensors", tensors=6)
    configs = [{"bit_width": bits, "symmetric": symmetric} for bits in (4, 8) for symmetric in (True, False)]
    alone = await make_manager(max_running_jobs=1)
    first = [await alone.submit(quantize_request(model, config=config)) for config in configs]
    for job in first:
        assert (await alone.jobs.wait(job.id, 60)).status is Status.SUCCEEDED
    together = await make_manager(max_running_jobs=4, data_dir=tmp_path / "other")
    second = [await together.submit(quantize_request(model, config=config)) for config in configs]
    for one, other in zip(first, second, strict=True):
        done = await together.jobs.wait(other.id, 60)
        assert done.status is Status.SUCCEEDED
        here = digests(tmp_path / "data" / "artifacts" / one.id / "compressed-tensors")
        assert digests(tmp_path / "other" / "artifacts" / other.id / "compressed-tensors") == here


async def test_a_waiting_job_is_cancelled_at_once(make_manager: MakeManager, root: Path) -> None:
    manager = await make_manager(max_running_jobs=1)
    running = await manager.submit(quantize_request(make_slow_model(root / "slow.safetensors"), **SLOW))
    waiting = await manager.submit(quantize_request(make_model(root / "m.safetensors")))
    assert manager.queue_depth == 1
    cancelled = await manager.cancel(waiting.id)
    assert cancelled.status is Status.CANCELLED
    assert cancelled.started_at is None
    assert manager.queue_depth == 0
    assert [event.type for event in await all_events(manager, waiting)] == ["job.queued", "job.cancelled"]
    await manager.cancel(running.id)
    assert (await manager.jobs.wait(running.id, 30)).status is Status.CANCELLED


async def test_a_running_job_is_cancelled_in_the_middle_of_a_tensor_and_leaves_nothing(
    manager: JobManager, root: Path, tmp_path: Path
) -> None:
    job = await manager.submit(quantize_request(make_slow_model(root / "slow.safetensors"), **SLOW))
    await until_running(manager, job)
    assert (await manager.cancel(job.id)).status is Status.CANCELLING
    assert (await manager.cancel(job.id)).status in (Status.CANCELLING, Status.CANCELLED), "a retry is harmless"
    done = await manager.jobs.wait(job.id, 30)
    assert done.status is Status.CANCELLED
    assert left_over(tmp_path) == []
    events = await all_events(manager, job)
    assert events[-1].type == "job.cancelled"
    assert TENSOR_COMPLETED not in [event.type for event in events]


async def test_cancelling_an_ended_job_changes_nothing(manager: JobManager, root: Path) -> None:
    job = await manager.submit(quantize_request(make_model(root / "m.safetensors")))
    done = await manager.jobs.wait(job.id, 60)
    assert await manager.cancel(job.id) == done
    with pytest.raises(NotFound):
        await manager.cancel("job_unknown")


async def test_cancels_at_any_moment_end_in_a_state_that_fits_the_files(
    manager: JobManager, root: Path, tmp_path: Path
) -> None:
    model = make_model(root / "m.safetensors", tensors=8)
    (root / "out").mkdir()
    for attempt in range(12):
        target = root / "out" / f"t{attempt}"
        outputs = [
            {"format": "compressed-tensors"},
            {"format": "compressed-tensors", "name": "b", "uri": target.as_uri()},
        ]
        job = await manager.submit(quantize_request(model, outputs=outputs))
        await asyncio.sleep(attempt * 0.02)
        await manager.cancel(job.id)
        done = await manager.jobs.wait(job.id, 60)
        kept = (tmp_path / "data" / "artifacts" / job.id).exists()
        if done.status is Status.SUCCEEDED:
            assert kept
            assert target.exists()
        else:
            assert done.status is Status.CANCELLED
            assert not kept
            assert not target.exists()
    assert files_below(tmp_path / "data" / "work") == []
    assert [name for name in files_below(root / "out") if name.startswith(".")] == []


async def test_a_job_that_takes_too_long_fails_by_that_name_and_leaves_nothing(
    manager: JobManager, root: Path, tmp_path: Path
) -> None:
    request = quantize_request(make_slow_model(root / "slow.safetensors"), timeout_s=0.2, **SLOW)
    done = await manager.jobs.wait((await manager.submit(request)).id, 60)
    assert done.status is Status.FAILED
    assert done.error is not None
    assert done.error.code == "job_timeout"
    assert left_over(tmp_path) == []


async def test_the_time_in_the_queue_does_not_count(make_manager: MakeManager, root: Path) -> None:
    manager = await make_manager(max_running_jobs=1)
    slow = await manager.submit(quantize_request(make_slow_model(root / "slow.safetensors"), timeout_s=4, **SLOW))
    quick = await manager.submit(quantize_request(make_model(root / "m.safetensors"), timeout_s=3))
    await manager.jobs.wait(slow.id, 60)
    assert (await manager.jobs.wait(quick.id, 60)).status is Status.SUCCEEDED


async def test_a_full_queue_refuses_and_takes_jobs_again_when_there_is_room(
    make_manager: MakeManager, root: Path
) -> None:
    manager = await make_manager(max_running_jobs=1, max_queued_jobs=3)
    running = await manager.submit(quantize_request(make_slow_model(root / "slow.safetensors"), **SLOW))
    request = quantize_request(make_model(root / "m.safetensors"))
    answers = await asyncio.gather(*(manager.submit(request) for _ in range(10)), return_exceptions=True)
    accepted = [answer for answer in answers if isinstance(answer, Job)]
    assert len(accepted) == 3
    assert all(isinstance(answer, (Job, QueueFull)) for answer in answers)
    assert manager.queue_depth == 3
    await manager.cancel(accepted[0].id)
    await manager.submit(request)
    with pytest.raises(QueueFull):
        await manager.submit(request)
    await manager.cancel(running.id)


async def test_higher_priorities_run_first_and_equals_in_order_of_arrival(
    make_manager: MakeManager, root: Path
) -> None:
    manager = await make_manager(max_running_jobs=1)
    running = await manager.submit(quantize_request(make_slow_model(root / "slow.safetensors"), **SLOW))
    model = make_model(root / "m.safetensors", tensors=1)
    priorities = [0, 5, -5, 5, 0, 100]
    jobs = [await manager.submit(quantize_request(model, priority=priority)) for priority in priorities]
    positions = [(await manager.jobs.events(job.id))[0].data["queue_position"] for job in jobs]
    assert positions == [0, 0, 2, 1, 3, 0]
    await manager.cancel(running.id)
    done = [await manager.jobs.wait(job.id, 60) for job in jobs]
    order = sorted(range(len(done)), key=lambda index: done[index].started_at)
    assert [priorities[index] for index in order] == [100, 5, 5, 0, 0, -5]
    assert order == [5, 1, 3, 0, 4, 2]


def write_nan(path: Path) -> Path:
    weights = np.ones((64, 128), np.float32)
    weights[3, 4] = np.nan
    save_file({"fine.weight": np.ones((64, 128), np.float32), "poisoned.weight": weights}, path)
    return path


def truncate(path: Path) -> Path:
    make_model(path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("make", "code", "config"),
    [
        (write_nan, "non_finite_weights", {}),
        (truncate, "corrupt_model", {}),
        (make_model, "accuracy_too_low", {"bit_width": 2, "min_accuracy": 0.999, "on_failure": "fail"}),
    ],
)
async def test_a_job_that_fails_says_why_and_leaves_nothing(
    manager: JobManager, root: Path, tmp_path: Path, make, code: str, config: dict
) -> None:
    job = await manager.submit(quantize_request(make(root / "m.safetensors"), config=config))
    done = await manager.jobs.wait(job.id, 60)
    assert done.status is Status.FAILED
    assert done.error is not None
    assert done.error.code == code
    assert str(tmp_path) not in done.error.detail
    if code == "non_finite_weights":
        assert done.error.tensor == "poisoned.weight"
    assert left_over(tmp_path) == []
    with pytest.raises(NotFinished):
        await manager.jobs.report(job.id)


async def test_a_fault_of_ours_fails_one_job_with_an_id_that_is_in_the_log_and_tells_no_path(
    make_manager: MakeManager, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = await make_manager()
    job = await first.submit(quantize_request(make_long_model(root / "long.safetensors"), **SLOW))
    await until_running(first, job)
    await first.drain(20)
    # Nothing that this service writes: whoever reads it back has to stumble.
    (tmp_path / "data" / "work" / job.id / "report.json").write_bytes(b"[1, 2")
    second = await make_manager()
    done = await second.jobs.wait(job.id, 60)
    assert done.status is Status.FAILED
    assert done.error is not None
    assert done.error.code == "internal_error"
    incident = done.error.detail.rsplit(maxsplit=1)[-1]
    assert incident in caplog.text
    assert "Traceback" in caplog.text
    assert "Traceback" not in done.error.detail
    assert "/" not in done.error.detail
    assert left_over(tmp_path) == []
    other = await second.submit(quantize_request(make_model(root / "m.safetensors")))
    assert (await second.jobs.wait(other.id, 60)).status is Status.SUCCEEDED


async def test_a_source_that_is_gone_when_the_job_starts_fails_it(make_manager: MakeManager, root: Path) -> None:
    manager = await make_manager(max_running_jobs=1)
    running = await manager.submit(quantize_request(make_slow_model(root / "slow.safetensors"), **SLOW))
    model = make_model(root / "m.safetensors")
    job = await manager.submit(quantize_request(model))
    model.unlink()
    await manager.cancel(running.id)
    done = await manager.jobs.wait(job.id, 60)
    assert done.error is not None
    assert (done.error.code, done.error.pointer) == ("model_not_found", "/source/uri")


async def test_what_can_be_refused_at_once_is_refused_with_the_field_that_is_wrong(
    manager: JobManager, root: Path, tmp_path: Path
) -> None:
    model = make_model(root / "m.safetensors")
    (root / "model.bin").write_bytes(b"\x80\x04x")
    (root / "empty").mkdir()
    (root / "taken").mkdir()
    (root / "taken" / "file").write_bytes(b"x")
    here = {"format": "compressed-tensors"}
    cases = [
        (quantize_request(tmp_path / "secret"), ForbiddenPath, "/source/uri"),
        (quantize_request(root / "missing"), ModelNotFound, "/source/uri"),
        (quantize_request(root / "empty"), ModelNotFound, None),
        (quantize_request(root / "model.bin"), PickledWeights, None),
        (quantize_request({"type": "job", "job_id": "job_1"}), ModelNotFound, "/source/job_id"),
        (quantize_request({"type": "uri", "uri": "s3://b/m"}), InvalidConfig, "/source/uri"),
        (quantize_request(model, config={"backend": "abacus"}), InvalidConfig, "/config/backend"),
        (quantize_request(model, outputs=[here, here]), InvalidConfig, "/outputs"),
        (quantize_request(model, outputs=[{"format": "cuneiform"}]), InvalidConfig, "/outputs/0/format"),
        (quantize_request(model, outputs=[{"format": "safetensors"}]), UnsupportedByFormat, "/outputs/0/format"),
        (quantize_request(model, outputs=[here | {"name": "report.json"}]), InvalidConfig, "/outputs/0/name"),
        (quantize_request(model, outputs=[here | {"uri": (root / "taken").as_uri()}]), TargetInUse, "/outputs/0/uri"),
        (quantize_request(model, outputs=[here | {"uri": "file:///etc/x"}]), ForbiddenPath, "/outputs/0/uri"),
    ]
    for request, error, pointer in cases:
        with pytest.raises(error) as caught:
            await manager.submit(request)
        if pointer is not None:
            assert caught.value.pointer == pointer
    assert (await manager.jobs.find())[0] == []
    assert manager.live_jobs == 0
    assert left_over(tmp_path) == []


async def test_an_output_with_an_address_of_its_own_appears_there_and_nowhere_else(
    manager: JobManager, root: Path, tmp_path: Path
) -> None:
    model = make_model(root / "m.safetensors")
    outputs = [{"format": "compressed-tensors", "name": "mine", "uri": (root / "out").as_uri()}]
    done = await manager.jobs.wait((await manager.submit(quantize_request(model, outputs=outputs))).id, 60)
    assert done.status is Status.SUCCEEDED, done.error
    assert {Path(artifact.location).parent for artifact in done.artifacts} == {root / "out"}
    assert [name for name in files_below(root) if "/" not in name] == ["m.safetensors", "out"]
    assert files_below(tmp_path / "data" / "artifacts" / done.id) == ["report.json"]
    check = await manager.submit(validate_request(model, done.id))
    assert (await manager.jobs.wait(check.id, 60)).status is Status.SUCCEEDED
    await manager.purge(done.id)
    assert (root / "out" / "manifest.json").exists(), "what was written for the user stays"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
async def test_an_output_on_another_file_system_is_copied_beside_and_renamed(
    make_manager: MakeManager, root: Path, tmp_path: Path
) -> None:
    elsewhere = Path("/dev/shm") / tmp_path.name / "roots"
    elsewhere.mkdir(parents=True)
    try:
        manager = await make_manager(model_roots=[root, elsewhere])
        target = elsewhere / "out"
        outputs = [
            {"format": "compressed-tensors"},
            {"format": "compressed-tensors", "name": "b", "uri": target.as_uri()},
        ]
        job = await manager.submit(quantize_request(make_model(root / "m.safetensors"), outputs=outputs))
        assert (await manager.jobs.wait(job.id, 60)).status is Status.SUCCEEDED
        assert digests(target) == digests(tmp_path / "data" / "artifacts" / job.id / "compressed-tensors")
        assert [path.name for path in elsewhere.iterdir()] == ["out"]
    finally:
        shutil.rmtree(elsewhere.parent)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
async def test_an_output_whose_original_is_half_removed_is_published_already(
    make_manager: MakeManager, root: Path, tmp_path: Path
) -> None:
    elsewhere = Path("/dev/shm") / tmp_path.name / "roots"
    elsewhere.mkdir(parents=True)
    try:
        manager = await make_manager(model_roots=[root, elsewhere])
        target = elsewhere / "out"
        outputs = [{"format": "compressed-tensors", "uri": target.as_uri()}]
        job = await manager.submit(quantize_request(make_model(root / "m.safetensors"), outputs=outputs))
        done = await manager.jobs.wait(job.id, 60)
        written = digests(target)
        folders = Folders(tmp_path / "data")
        original = folders.work(job.id) / "compressed-tensors"
        original.mkdir(parents=True)
        (original / "model.safetensors").write_bytes(b"what a killed server had not removed")
        publisher = Publisher(folders, [root, elsewhere], Stores(StoreOptions()))
        report = publisher.committed(job.id)
        assert report is not None
        assert publisher.publish(done, report, lambda: False) == done.artifacts
        assert digests(target) == written
        assert not folders.work(job.id).exists()
    finally:
        shutil.rmtree(elsewhere.parent)


async def test_two_jobs_cannot_write_to_one_address(make_manager: MakeManager, root: Path) -> None:
    manager = await make_manager(max_running_jobs=1)
    model = make_slow_model(root / "slow.safetensors")

    def request(name: str):
        outputs = [{"format": "compressed-tensors", "uri": (root / name).as_uri()}]
        return quantize_request(model, outputs=outputs, **SLOW)

    (root / "dir").mkdir()
    first = await manager.submit(request("dir"))
    for name in ("dir", "dir/"):
        with pytest.raises(TargetInUse):
            await manager.submit(request(name))
    with pytest.raises(TargetInUse):
        await manager.submit(request("dir/inside"))
    await manager.cancel(first.id)
    await manager.jobs.wait(first.id, 30)
    again = await manager.submit(request("dir"))
    await manager.cancel(again.id)


async def test_purging_deletes_record_events_report_and_artifacts(
    make_manager: MakeManager, root: Path, tmp_path: Path
) -> None:
    manager = await make_manager()
    job = await manager.submit(quantize_request(make_slow_model(root / "slow.safetensors"), **SLOW))
    with pytest.raises(NotTerminal):
        await manager.purge(job.id)
    await manager.cancel(job.id)
    await manager.jobs.wait(job.id, 30)
    done = await manager.submit(quantize_request(make_model(root / "m.safetensors")))
    await manager.jobs.wait(done.id, 60)
    for each in (job, done):
        await manager.purge(each.id)
        assert await manager.jobs.events(each.id) == []
        for call in (manager.jobs.get, manager.jobs.report, manager.purge):
            with pytest.raises(NotFound):
                await call(each.id)
    assert left_over(tmp_path) == []


async def test_waiting_ends_with_the_job_or_with_the_time(manager: JobManager, root: Path) -> None:
    job = await manager.submit(quantize_request(make_slow_model(root / "slow.safetensors"), **SLOW))
    assert not (await manager.jobs.wait(job.id, 0.01)).status.is_terminal
    waiting = asyncio.create_task(manager.jobs.wait(job.id, 60))
    await manager.cancel(job.id)
    assert (await waiting).status is Status.CANCELLED
    with pytest.raises(NotFound):
        await manager.jobs.wait("job_unknown", 1)


async def test_a_client_that_hangs_up_while_submitting_leaves_a_whole_job_or_none(
    manager: JobManager, root: Path
) -> None:
    request = quantize_request(make_model(root / "m.safetensors", tensors=1))
    for turns in range(8):
        task = asyncio.create_task(manager.submit(request))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    for _ in range(200):
        jobs, _ = await manager.jobs.find()
        if jobs and all(job.status.is_terminal for job in jobs) and manager.live_jobs == 0:
            break
        await asyncio.sleep(0.05)
    assert all(job.status is Status.SUCCEEDED for job in jobs)


async def test_nothing_is_held_in_memory_of_jobs_that_have_ended(manager: JobManager, root: Path) -> None:
    model = make_model(root / "m.safetensors", tensors=2)
    watched = []
    for _ in range(10):
        job = await manager.submit(quantize_request(model))
        watched.append(weakref.ref(manager._live[job.id].log))
        await all_events(manager, job)
    assert manager.live_jobs == 0
    assert manager.running == 0
    await asyncio.sleep(0.05)
    gc.collect()
    assert [ref for ref in watched if ref() is not None] == []
    assert not manager._tasks


async def test_draining_ends_streams_refuses_jobs_and_keeps_what_was_done(
    make_manager: MakeManager, root: Path, tmp_path: Path
) -> None:
    first = await make_manager(max_running_jobs=1)
    model = make_long_model(root / "long.safetensors")
    job = await first.submit(quantize_request(model, **SLOW))
    waiting = await first.submit(quantize_request(make_model(root / "m.safetensors")))
    stream = asyncio.create_task(all_events(first, job))
    async for item in first.jobs.follow(job.id):
        if isinstance(item, Event) and item.type == TENSOR_COMPLETED:
            break
    drain = asyncio.create_task(first.drain(20))
    await asyncio.sleep(0)
    assert first.is_draining
    with pytest.raises(Draining):
        await first.submit(quantize_request(model))
    await drain
    last = (await stream)[-1]
    assert (last.id, last.type) == (None, SERVER_DRAINING)
    assert (tmp_path / "data" / "work" / job.id / "checkpoint.jsonl").exists()

    second = await make_manager()
    done = await second.jobs.wait(job.id, 60)
    assert done.status is Status.SUCCEEDED, done.error
    assert (await second.jobs.wait(waiting.id, 60)).status is Status.SUCCEEDED
    types = [event.type for event in await second.jobs.events(job.id, limit=1000)]
    assert types.count("job.resumed") == 1
    assert types.count(TENSOR_COMPLETED) == 40, "each tensor is told once, before or after"
    ids = [event.id for event in await second.jobs.events(job.id, limit=1000)]
    assert ids == sorted(set(ids))
    undisturbed = await second.submit(quantize_request(model, **SLOW))
    await second.jobs.wait(undisturbed.id, 60)
    artifacts = tmp_path / "data" / "artifacts"
    assert digests(artifacts / job.id / "compressed-tensors") == digests(
        artifacts / undisturbed.id / "compressed-tensors"
    )


async def test_a_plan_is_made_without_a_job(manager: JobManager, root: Path, tmp_path: Path) -> None:
    plan = await manager.plans.make(quantize_request(make_model(root / "m.safetensors")))
    assert len(plan.tensors) == 4
    assert (await manager.jobs.find())[0] == []
    assert left_over(tmp_path) == []


async def test_the_weights_that_come_out_are_those_that_went_in(manager: JobManager, root: Path) -> None:
    model = make_model(root / "m.safetensors")
    job = await manager.submit(quantize_request(model, config={"skip": ["*"]}))
    done = await manager.jobs.wait(job.id, 60)
    assert done.status is Status.SUCCEEDED, done.error
    (weights,) = (Path(a.location) for a in done.artifacts if a.path.endswith(".safetensors"))
    before, after = load_file(model), load_file(weights)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(backends()["cuda"].unavailable() is None, reason="this machine has a GPU")
async def test_a_backend_that_cannot_be_made_ready_is_told_with_its_reason(make_manager: MakeManager) -> None:
    manager = await make_manager(config_defaults=QuantizationConfig(backend="cuda"))
    for _ in range(1000):
        if manager.is_warm:
            break
        await asyncio.sleep(0.01)
    assert "backend 'cuda' cannot run on this server" in (manager.warm_up_fault or "")


async def test_the_compiler_is_loaded_off_the_event_loop_and_spared_by_the_garbage_collector(tmp_path: Path) -> None:
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", WARM_UP, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"threads": ["warm-up"], "spared": True}
