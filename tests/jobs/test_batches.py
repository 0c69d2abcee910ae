"""Batches in the manager and the store: one transaction, one stream, and what a crash or a full disk makes of them."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from service.errors import (
    IdempotencyKeyInFlight,
    IdempotencyKeyReused,
    InvalidConfig,
    NotFound,
    NotTerminal,
    QueueFull,
    StorageFailure,
    TargetInUse,
)
from service.jobs.batch import Batch, BatchStatus
from service.jobs.events import PROGRESS, TOO_SLOW, Event, Silence
from service.jobs.idempotency import Key, Once
from service.jobs.job import Job, Status
from service.jobs.manager import JobManager
from service.jobs.request import BatchRequest, JobRequest
from service.jobs.store import DATABASE
from tests.jobs.conftest import MakeManager
from tests.jobs.models import files_below, make_model, make_slow_model, quantize_request

SLOW = {"config": {"method": "mse"}}


def batch_of(*items: JobRequest, **labels: str) -> BatchRequest:
    return BatchRequest(items=list(items), labels=labels)


def once(tenant: str, text: str, digest: str = "d") -> Once[Any]:
    return Once(Key(tenant, text, digest), lambda made: made.id)


async def all_events(manager: JobManager, batch: Batch, after: int = 0) -> list[Event]:
    follow = manager.batches.follow(batch.id, after=after)
    return [item async for item in follow if isinstance(item, Event)]


async def jobs_of(manager: JobManager, batch: Batch) -> list[Job]:
    return [await manager.jobs.get(job_id) for job_id in batch.job_ids]


async def test_items_become_jobs_in_order_and_higher_priorities_go_first(make_manager: MakeManager, root: Path) -> None:
    manager = await make_manager(max_running_jobs=1)
    model = make_model(root / "m.safetensors")
    blocker = await manager.submit(quantize_request(make_slow_model(root / "slow.safetensors"), **SLOW))
    waiting = await manager.submit(quantize_request(model))
    priorities = (0, 5, 0, -1, 5)
    batch = await manager.submit_batch(batch_of(*(quantize_request(model, priority=p) for p in priorities), a="b"))
    assert batch.counts == {Status.QUEUED: 5}
    assert batch.labels == {"a": "b"}
    assert batch.id.startswith("batch_")
    events = [(await manager.jobs.events(job_id))[0] for job_id in batch.job_ids]
    assert [event.data["queue_position"] for event in events] == [3, 0, 4, 5, 1]
    await manager.cancel(blocker.id)
    done = await manager.batches.wait(batch.id, 60)
    assert (done.status, done.counts) == (BatchStatus.ENDED, {Status.SUCCEEDED: 5})
    jobs = await jobs_of(manager, batch)
    assert [job.batch_index for job in jobs] == [0, 1, 2, 3, 4]
    started = sorted([*jobs, await manager.jobs.get(waiting.id)], key=lambda job: job.started_at or job.created_at)
    assert [job.batch_index for job in started] == [1, 4, None, 0, 2, 3]


async def test_a_refused_item_leaves_no_trace_of_the_others(
    make_manager: MakeManager, root: Path, tmp_path: Path
) -> None:
    manager = await make_manager(max_queued_jobs=3)
    good = quantize_request(make_model(root / "m.safetensors"))
    elsewhere = quantize_request(
        root / "m.safetensors", outputs=[{"format": "parquet", "uri": (root / "out").as_uri()}]
    )
    inside = quantize_request(
        root / "m.safetensors", outputs=[{"format": "parquet", "uri": (root / "out" / "deeper").as_uri()}]
    )
    with pytest.raises(InvalidConfig) as invalid:
        await manager.submit_batch(batch_of(good, quantize_request(root / "m.safetensors", config={"backend": "no"})))
    assert (invalid.value.pointer or "").startswith("/items/1/config")
    (root / "out").mkdir()
    for pair in ((elsewhere, elsewhere), (elsewhere, inside), (inside, elsewhere)):
        with pytest.raises(TargetInUse) as taken:
            await manager.submit_batch(batch_of(*pair))
        assert (taken.value.pointer or "").startswith("/items/1")
    with pytest.raises(QueueFull):
        await manager.submit_batch(batch_of(*[good] * 4))
    assert manager.live_jobs == 0
    assert (await manager.jobs.find(), await manager.batches.find()) == (([], None), ([], None))
    assert files_below(tmp_path / "data" / "work") == []
    batch = await manager.submit_batch(batch_of(good, good, elsewhere))
    assert (await manager.batches.wait(batch.id, 60)).counts == {Status.SUCCEEDED: 3}


async def test_a_database_that_cannot_be_written_takes_nothing_of_a_batch_and_forgets_its_key(
    make_manager: MakeManager, root: Path, tmp_path: Path
) -> None:
    manager = await make_manager()
    request = batch_of(*[quantize_request(make_model(root / "m.safetensors"))] * 3)
    database = sqlite3.connect(tmp_path / "data" / DATABASE, isolation_level=None)
    # Any of the statements may be the one that fails: here that of the last job.
    database.execute(
        "CREATE TRIGGER broken BEFORE INSERT ON jobs WHEN (SELECT count(*) FROM jobs) = 2 "
        "BEGIN SELECT raise(ABORT, 'no'); END"
    )
    with pytest.raises(StorageFailure):
        await manager.submit_batch(request, once=once("t", "k"))
    assert manager.live_jobs == 0
    for table in ("jobs", "batches", "events", "batch_events", "idempotency_keys"):
        assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table
    database.execute("DROP TRIGGER broken")
    database.close()
    async with manager.keys.claim(Key("t", "k", "d")) as known:
        assert known is None
    batch = await manager.submit_batch(request, once=once("t", "k"))
    async with manager.keys.claim(Key("t", "k", "d")) as known:
        assert known == batch.id
    assert (await manager.batches.wait(batch.id, 60)).status is BatchStatus.ENDED


async def test_readers_that_come_at_any_time_see_the_same_events_once(manager: JobManager, root: Path) -> None:
    model = make_model(root / "m.safetensors", tensors=6)
    batch = await manager.submit_batch(batch_of(*[quantize_request(model)] * 4))
    readers = []
    for _ in range(5):
        readers.append(asyncio.create_task(all_events(manager, batch)))
        await asyncio.sleep(0.03)
    seen = [[e for e in events if e.type != PROGRESS] for events in await asyncio.gather(*readers)]
    stored = await all_events(manager, batch)
    for events in seen:
        assert [(e.id, e.type, e.job_id) for e in events] == [(e.id, e.type, e.job_id) for e in stored]
    assert Counter(e.type for e in stored) == {
        "job.queued": 4, "job.started": 4, "tensor.completed": 24, "job.succeeded": 4
    }  # fmt: skip
    assert manager.readers == 0
    middle = stored[17].id or 0
    assert await all_events(manager, batch, after=middle) == stored[18:]


async def test_a_reader_that_is_too_slow_is_cut_off_and_resumes(make_manager: MakeManager, root: Path) -> None:
    manager = await make_manager(reader_limit=4, max_running_jobs=1)
    slow = quantize_request(make_slow_model(root / "slow.safetensors"), **SLOW)
    quick = quantize_request(make_model(root / "m.safetensors"))
    batch = await manager.submit_batch(batch_of(slow, quick, quick))
    follow = manager.batches.follow(batch.id)
    async for item in follow:
        if isinstance(item, Event) and item.type == PROGRESS:
            break
    await manager.cancel(batch.job_ids[0])
    await manager.batches.wait(batch.id, 60)
    rest = [item async for item in follow if isinstance(item, Event)]
    assert (rest[-1].id, rest[-1].type, rest[-1].merged) == (None, TOO_SLOW, None)
    assert len(rest) == 5
    missed = await all_events(manager, batch, after=rest[-2].id or 0)
    told = [e for e in rest[:-1] if e.type != PROGRESS] + missed
    assert Counter(e.type for e in told if e.is_terminal) == {"job.cancelled": 1, "job.succeeded": 2}


async def test_a_reader_who_comes_after_the_newest_events_were_purged_waits_for_the_next(
    make_manager: MakeManager, root: Path
) -> None:
    manager = await make_manager(max_running_jobs=2)
    slow = quantize_request(make_slow_model(root / "slow.safetensors"), **SLOW)
    batch = await manager.submit_batch(batch_of(slow, quantize_request(make_model(root / "m.safetensors"))))
    async with aclosing(manager.batches.follow(batch.id)) as items:
        async for item in items:
            if isinstance(item, Event) and item.type == PROGRESS and item.job_id == batch.job_ids[0]:
                break
    await manager.jobs.wait(batch.job_ids[1], 60)
    await manager.purge(batch.job_ids[1])
    async with aclosing(manager.batches.follow(batch.id)) as items:
        seen = [await anext(items) for _ in range(3)]
    assert [item.type for item in seen[:2] if isinstance(item, Event)] == ["job.queued", "job.started"]
    assert isinstance(seen[2], Silence) or seen[2].type == PROGRESS
    await manager.batches.cancel(batch.id)


async def test_batches_of_other_tenants_are_as_good_as_unknown(manager: JobManager, root: Path) -> None:
    request = batch_of(quantize_request(make_model(root / "m.safetensors")))
    batch = await manager.submit_batch(request, "ours")
    for call in (manager.batches.get, manager.batches.cancel, manager.batches.purge):
        with pytest.raises(NotFound):
            await call(batch.id, "theirs")
    with pytest.raises(NotFound):
        await manager.batches.wait(batch.id, 1, "theirs")
    assert await manager.batches.find(tenant="theirs") == ([], None)
    assert await manager.jobs.find(tenant="theirs", batch_id=batch.id) == ([], None)
    assert [b.id for b in (await manager.batches.find(tenant="ours"))[0]] == [batch.id]
    done = await manager.batches.wait(batch.id, 60, "ours")
    assert done.counts == {Status.SUCCEEDED: 1}
    await manager.batches.purge(batch.id, "ours")


async def test_keys_of_tenants_are_apart_and_those_of_one_are_held_once(manager: JobManager, root: Path) -> None:
    request = quantize_request(make_model(root / "m.safetensors"))
    ours = await manager.submit(request, "ours", once("ours", "k"))
    theirs = await manager.submit(request, "theirs", once("theirs", "k", "other"))
    assert ours.id != theirs.id
    for tenant, digest, job in (("ours", "d", ours), ("theirs", "other", theirs)):
        async with manager.keys.claim(Key(tenant, "k", digest)) as known:
            assert known == job.id
    with pytest.raises(IdempotencyKeyReused):
        async with manager.keys.claim(Key("ours", "k", "other")):
            pass
    async with manager.keys.claim(Key("ours", "new", "d")) as known:
        assert known is None
        async with manager.keys.claim(Key("theirs", "new", "d")) as known:
            assert known is None
        with pytest.raises(IdempotencyKeyInFlight):
            async with manager.keys.claim(Key("ours", "new", "d")):
                pass
    # Even where two calls came through together, the second one finds the key in the database.
    with pytest.raises(StorageFailure):
        await manager.submit(request, "ours", once("ours", "k"))
    assert len((await manager.jobs.find(tenant="ours"))[0]) == 1
    for job in (ours, theirs):
        await manager.jobs.wait(job.id, 60)


async def test_cancelling_starts_nothing_and_purging_waits_for_the_end(
    make_manager: MakeManager, root: Path, tmp_path: Path
) -> None:
    manager = await make_manager(max_running_jobs=2)
    slow = quantize_request(make_slow_model(root / "slow.safetensors"), **SLOW)
    batch = await manager.submit_batch(batch_of(*[slow] * 6))
    async for item in manager.batches.follow(batch.id):
        if isinstance(item, Event) and item.type == PROGRESS:
            break
    with pytest.raises(NotTerminal):
        await manager.batches.purge(batch.id)
    begun = time.monotonic()
    await manager.batches.cancel(batch.id)
    done = await manager.batches.wait(batch.id, 60)
    print(f"cancelled in {time.monotonic() - begun:.3f} s")
    assert (done.status, done.counts) == (BatchStatus.ENDED, {Status.CANCELLED: 6})
    assert done.finished_at is not None
    types = Counter(e.type for e in await all_events(manager, batch))
    assert types == {"job.queued": 6, "job.started": 2, "job.cancelled": 6}
    assert await manager.batches.cancel(batch.id) == done
    await manager.batches.purge(batch.id)
    assert (await manager.jobs.find(), await manager.batches.find()) == (([], None), ([], None))
    assert files_below(tmp_path / "data" / "work") + files_below(tmp_path / "data" / "artifacts") == []


async def test_a_restart_goes_on_with_what_had_not_ended_under_larger_ids(
    make_manager: MakeManager, root: Path
) -> None:
    first = await make_manager(max_running_jobs=1)
    quick, slow = (
        quantize_request(make_model(root / "m.safetensors")),
        quantize_request(make_slow_model(root / "slow.safetensors"), **SLOW),
    )
    batch = await first.submit_batch(batch_of(quick, slow, quick))
    async for item in first.batches.follow(batch.id):
        if isinstance(item, Event) and item.type == PROGRESS and item.merged and item.merged.index == 1:
            break
    seen = item.id or 0
    await first.drain(10)
    second = await make_manager(max_running_jobs=1)
    going_on = await second.batches.get(batch.id)
    assert going_on.status is BatchStatus.IN_PROGRESS
    assert going_on.counts == {Status.SUCCEEDED: 1, Status.RUNNING: 1, Status.QUEUED: 1}
    rest = await all_events(second, batch, after=seen)
    assert [e.type for e in rest if e.type != PROGRESS][:1] == ["job.resumed"]
    assert all((e.id or 0) > seen for e in rest)
    assert rest[-1].merged is not None
    assert rest[-1].merged.is_last
    assert (await second.batches.get(batch.id)).counts == {Status.SUCCEEDED: 3}
    ids = [e.id or 0 for e in await all_events(second, batch)]
    assert ids == sorted(set(ids))


async def test_a_thousand_items_are_one_transaction_and_hold_nobody_up(make_manager: MakeManager, root: Path) -> None:
    manager = await make_manager(max_running_jobs=1)
    request = batch_of(*[quantize_request(make_model(root / "m.safetensors", tensors=1), **SLOW)] * 1000)
    late = 0.0

    async def watch() -> None:
        nonlocal late
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            late = max(late, time.monotonic() - before - 0.01)

    watching = asyncio.create_task(watch())
    begun = time.monotonic()
    batch = await manager.submit_batch(request)
    accepted = time.monotonic()
    await manager.batches.cancel(batch.id)
    done = await manager.batches.wait(batch.id, 60)
    print(f"accepted in {accepted - begun:.2f} s, cancelled in {time.monotonic() - accepted:.2f} s, stall {late:.3f} s")
    watching.cancel()
    assert sum(done.counts.values()) == 1000
    assert done.counts[Status.CANCELLED] >= 990
    assert [e.id for e in await all_events(manager, batch)][:1000] == list(range(1, 1001))
    assert manager.live_jobs == 0
