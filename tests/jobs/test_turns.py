"""Jobs that take turns, over drains and restarts of the manager."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.engine.progress import Progress
from service.jobs.events import Event
from service.jobs.job import Job, Status
from service.jobs.manager import JobManager
from service.jobs.stop import Reason, StopSignal
from tests.jobs.conftest import MakeManager
from tests.jobs.models import digests, files_below, make_model, quantize_request

SLOW = {"config": {"method": "mse"}}
MIB = 1 << 20
#: That take longer than a turn.
TENSORS = 160


def progress(tensors_done: int, tensors_total: int) -> Progress:
    return Progress(0.5, "quantizing", tensors_done, tensors_total, 0, 0, 0.0, None)


async def at_work(manager: JobManager, root: Path, **fields: object) -> Job:
    """A job of seconds that has finished its first tensor."""
    model = root / "long.safetensors"
    if not model.exists():
        make_model(model, tensors=TENSORS, cols=512)
    job = await manager.submit(quantize_request(model, **SLOW, **fields))
    async for item in manager.jobs.follow(job.id):
        if isinstance(item, Event) and item.type == "tensor.completed":
            break
    return job


async def test_a_job_that_made_room_goes_on_after_a_drain_and_gives_the_same_bytes(
    make_manager: MakeManager, tmp_path: Path, root: Path
) -> None:
    first = await make_manager(max_running_jobs=1)
    job = await at_work(first, root)
    urgent = await at_work(first, root, priority=1)
    assert (first.running, first.queue_depth) == (1, 1)
    assert (await first.jobs.get(job.id)).status is Status.RUNNING, "it has begun, and will go on"
    await first.drain(20)

    second = await make_manager(max_running_jobs=1)
    done = [await second.jobs.wait(each.id, 60) for each in (job, urgent)]
    assert [each.status for each in done] == [Status.SUCCEEDED, Status.SUCCEEDED]
    folders = [tmp_path / "data" / "artifacts" / each.id / "compressed-tensors" for each in done]
    assert digests(folders[0]) == digests(folders[1])
    types = [event.type for event in await second.jobs.events(job.id, limit=1000)]
    assert (types.count("job.started"), types.count("job.resumed"), types.count("tensor.completed")) == (1, 1, TENSORS)


async def test_the_report_of_a_job_leaves_out_the_time_in_which_others_had_its_lane(
    make_manager: MakeManager, root: Path
) -> None:
    manager = await make_manager(max_running_jobs=1)
    job = await at_work(manager, root)
    others = [await manager.submit(quantize_request(root / "long.safetensors", priority=1, **SLOW)) for _ in range(2)]
    done = await manager.jobs.wait(job.id, 120)
    assert done.started_at is not None
    assert done.finished_at is not None
    elsewhere = sum([(await manager.jobs.report(other.id)).seconds for other in others])
    assert elsewhere > 0
    taken = (await manager.jobs.report(job.id)).seconds
    assert taken <= (done.finished_at - done.started_at).total_seconds() - elsewhere


async def test_a_time_limit_does_not_count_the_turns_of_others(make_manager: MakeManager, root: Path) -> None:
    manager = await make_manager(max_running_jobs=1)
    alone = await manager.jobs.wait((await at_work(manager, root)).id, 120)
    seconds = (await manager.jobs.report(alone.id)).seconds
    job = await at_work(manager, root, timeout_s=2 * seconds + 2.0)
    others = [await manager.submit(quantize_request(root / "long.safetensors", priority=1, **SLOW)) for _ in range(4)]
    done = await manager.jobs.wait(job.id, 240)
    assert done.status is Status.SUCCEEDED, done.error
    ended = [(await manager.jobs.get(other.id)).finished_at for other in others]
    assert all(at is not None and done.finished_at is not None and at < done.finished_at for at in ended)


async def test_the_time_to_begin_goes_on_counting_over_a_restart(make_manager: MakeManager, root: Path) -> None:
    first = await make_manager(max_running_jobs=1)
    running = await at_work(first, root, priority=1)
    fields = {"max_pending_s": 0.4}
    late = await first.submit(quantize_request(make_model(root / "m.safetensors"), **fields))
    patient = await first.submit(quantize_request(root / "m.safetensors", max_pending_s=600))
    await first.drain(20)
    assert late.status is Status.QUEUED
    second = await make_manager(max_running_jobs=1)
    failed = await second.jobs.wait(late.id, 60)
    assert failed.error is not None
    assert failed.error.code == "pending_timeout"
    assert failed.finished_at is not None
    assert (failed.finished_at - failed.created_at).total_seconds() >= 0.4
    assert (await second.jobs.get(running.id)).status is Status.RUNNING, "it took no lane"
    await second.cancel(running.id)
    assert (await second.jobs.wait(patient.id, 60)).status is Status.SUCCEEDED


async def test_a_job_that_was_accepted_by_a_server_with_more_memory_fails_when_it_runs(
    make_manager: MakeManager, tmp_path: Path, root: Path
) -> None:
    first = await make_manager(max_running_jobs=1)
    await at_work(first, root)
    waiting = await first.submit(quantize_request(make_model(root / "m.safetensors", rows=2048, cols=2048)))
    await first.drain(20)
    second = await make_manager(max_running_jobs=1, memory_limit_bytes=20 * MIB)
    done = await second.jobs.wait(waiting.id, 60)
    assert done.error is not None
    assert (done.error.code, done.error.tensor) == ("exceeds_memory", "layers.0.weight")
    assert str(20 * MIB) in done.error.detail
    while second.live_jobs:
        await second.jobs.wait((await second.jobs.find())[0][-1].id, 1)
    assert files_below(tmp_path / "data" / "work") == []


async def test_jobs_of_which_nothing_is_known_after_a_restart_still_do_not_exceed_the_memory(
    make_manager: MakeManager, root: Path
) -> None:
    first = await make_manager(max_running_jobs=1)
    jobs = [await at_work(first, root)]
    jobs += [await first.submit(quantize_request(root / "long.safetensors", **SLOW)) for _ in range(2)]
    await first.drain(20)
    # Each needs more than half of it, which shows when its headers are read.
    second = await make_manager(max_running_jobs=3, memory_limit_bytes=60 * MIB)
    done = [await second.jobs.wait(job.id, 120) for job in jobs]
    assert [job.status for job in done] == [Status.SUCCEEDED] * 3
    ends = sorted(job.finished_at for job in done if job.finished_at is not None)
    assert ends[0] < ends[1] < ends[2]


def test_a_wish_to_park_waits_for_the_end_of_a_tensor_that_is_not_the_last() -> None:
    signal = StopSignal()
    report = signal.watching(lambda _: None)
    signal.ask_to_park()
    report(progress(tensors_done=3, tensors_total=6))
    assert not signal.is_set(), "it goes on behind three of an earlier turn"
    report(progress(tensors_done=3, tensors_total=6))
    assert not signal.is_set(), "in the middle of a tensor"
    report(progress(tensors_done=4, tensors_total=6))
    assert signal.is_set()
    assert signal.reason is Reason.PARK
    signal.ask(Reason.CANCEL)
    assert signal.reason is Reason.CANCEL


def test_a_wish_to_park_is_too_late_when_the_next_tensor_has_begun_or_there_is_none() -> None:
    signal = StopSignal()
    report = signal.watching(lambda _: None)
    report(progress(tensors_done=0, tensors_total=2))
    report(progress(tensors_done=1, tensors_total=2))
    assert not signal.is_set()
    signal.ask_to_park()
    assert not signal.is_set()
    report(progress(tensors_done=2, tensors_total=2))
    assert not signal.is_set(), "what is left is not begun a second time"


@pytest.mark.parametrize("reason", [Reason.CANCEL, Reason.DRAIN])
def test_other_reasons_do_not_wait(reason: Reason) -> None:
    signal = StopSignal()
    signal.ask_to_park()
    signal.ask(reason)
    assert signal.is_set()
    assert signal.reason is reason
