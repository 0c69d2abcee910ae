"""Events: replay, then live, without gap or duplicate, whoever else reads and however slowly."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from service.engine.progress import Notice, Progress, TensorCompleted
from service.jobs import standing
from service.jobs.events import (
    ID_EPOCH,
    PROGRESS,
    TENSOR_COMPLETED,
    TOO_SLOW,
    Event,
    Following,
    LiveLog,
    Silence,
    describe,
    next_epoch,
)
from service.jobs.job import Job, Status
from service.jobs.journal import Entry, Journal
from service.jobs.live import LiveJob
from service.jobs.mailbox import Mailbox
from service.jobs.store import Store
from service.jobs.watch import Watch
from tests.jobs.models import quantize_request


def progress(done: int, total: int = 1000) -> Progress:
    return Progress((done + 1) / (total + 2), "quantizing", done, total, 0, 0, 0.0, None)


def tensor(number: int) -> TensorCompleted:
    return TensorCompleted("out", f"t{number}", (64, 128), "int4", 4.25, 0.99, 20.0, 10, 5, 0.1)


class Bench:
    """A live job on a real store, and what follows it."""

    def __init__(self, path: Path, reader_limit: int = 4096) -> None:
        self.store = Store(path)
        job = Job("job_1", quantize_request(Path("/models/a")), {}, Status.QUEUED, datetime.now(UTC))
        log = LiveLog(job.id, next_id=1, last_stored_id=0, reader_limit=reader_limit)
        self.store.add(job, [])
        self.journal = Journal(lambda jobs, events: asyncio.to_thread(self.store.write, jobs, events))
        self.live = LiveJob(job, log, self.journal, self._forget, Watch())
        self.log: LiveLog | None = log

    def _forget(self, job: Job) -> None:
        del job
        self.log = None

    def follow(self, after: int = 0, silence_s: float = 30.0):
        async def read_page(last: int) -> list[Event]:
            return await asyncio.to_thread(self.store.events, "job_1", after=last, limit=7)

        return Following(lambda: self.log, read_page, after=after, silence_s=silence_s)

    async def collect(self, after: int = 0) -> list[Event]:
        return [item async for item in self.follow(after) if isinstance(item, Event)]

    async def close(self) -> None:
        await self.journal.stop()
        self.store.close()


@pytest.fixture
async def bench(tmp_path: Path):
    made = Bench(tmp_path)
    yield made
    await made.close()


def stored(events: list[Event]) -> list[int | None]:
    return [event.id for event in events if event.type != PROGRESS]


async def test_readers_that_come_at_any_time_all_see_every_stored_event_once_and_in_order(bench: Bench) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    bench.live.to(Status.RUNNING)
    readers = [asyncio.create_task(bench.collect())]
    for number in range(300):
        bench.live.happened(tensor(number))
        if rng.random() < 0.3:
            bench.live.happened(progress(number))
        if rng.random() < 0.1:
            readers.append(asyncio.create_task(bench.collect()))
        if rng.random() < 0.2:
            await asyncio.sleep(rng.random() * 0.003)
    bench.live.to(Status.SUCCEEDED)
    seen = await asyncio.gather(*readers, bench.collect())
    everything = [event.id for event in bench.store.events("job_1", limit=1000)]
    assert len(everything) == 302
    for events in seen:
        assert stored(events) == everything
        ids = [event.id for event in events]
        assert ids == sorted(set(ids))
        assert events[-1].job is not None
        assert events[-1].job.status is Status.SUCCEEDED


async def test_a_reader_that_resumes_anywhere_misses_and_repeats_nothing(bench: Bench) -> None:
    bench.live.to(Status.RUNNING)
    for number in range(40):
        bench.live.happened(tensor(number))
    bench.live.to(Status.SUCCEEDED)
    whole = await bench.collect()
    for cut in whole:
        resumed = await bench.collect(after=cut.id or 0)
        assert [e.id for e in resumed] == [e.id for e in whole if (e.id or 0) > (cut.id or 0)]


async def test_what_is_replayed_equals_what_was_seen_live(bench: Bench) -> None:
    reader = asyncio.create_task(bench.collect())
    await asyncio.sleep(0)
    bench.live.to(Status.RUNNING)
    bench.live.happened(tensor(1))
    bench.live.happened(Notice("fallback", "8 bits instead", "t1"))
    bench.live.to(Status.SUCCEEDED, result={"passed": True})
    assert await reader == await bench.collect()


async def test_an_event_is_stored_before_anyone_sees_it(bench: Bench) -> None:
    bench.live.to(Status.RUNNING)
    async with aclosing(bench.follow()) as items:
        for number in range(50):
            bench.live.happened(tensor(number))
            event = await anext(items)
            assert isinstance(event, Event)
            assert event.id in [e.id for e in bench.store.events("job_1")]


async def test_progress_comes_at_most_ten_times_a_second_and_the_last_is_not_lost(bench: Bench) -> None:
    reader = asyncio.create_task(bench.collect())
    bench.live.to(Status.RUNNING)
    loop = asyncio.get_running_loop()
    start = loop.time()
    for number in range(500):
        bench.live.happened(progress(number))
        await asyncio.sleep(0.001)
    bench.live.to(Status.SUCCEEDED)
    elapsed = loop.time() - start
    seen = [event for event in await reader if event.type == PROGRESS]
    assert 2 <= len(seen) <= elapsed * 10 + 2
    assert seen[-1].data["tensors_done"] == 499
    fractions = [event.data["fraction"] for event in seen]
    assert fractions == sorted(fractions)
    assert not [event for event in bench.store.events("job_1") if event.type == PROGRESS]


async def test_a_slow_reader_is_cut_off_with_a_reason_and_can_resume_while_others_see_everything(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, reader_limit=300)
    slow = bench.follow()
    bench.live.to(Status.RUNNING)
    first = await anext(slow)
    fast = asyncio.create_task(bench.collect())
    parked = asyncio.create_task(anext(slow))
    await asyncio.sleep(0)
    for number in range(1000):
        bench.live.happened(tensor(number))
        if number % 50 == 0:
            await bench.journal.settled()
    bench.live.to(Status.SUCCEEDED)
    seen = [first, await parked] + [item async for item in slow]
    last = seen[-1]
    assert isinstance(last, Event)
    assert (last.id, last.type) == (None, TOO_SLOW)
    ids = [item.id for item in seen[:-1] if isinstance(item, Event)]
    assert ids == list(range(1, len(ids) + 1))
    assert len(ids) < 1000
    resumed = await bench.collect(after=ids[-1] or 0)
    assert stored(await fast) == ids + stored(resumed)
    await bench.close()


async def test_silence_is_told_so_that_the_line_stays_open(bench: Bench) -> None:
    bench.live.to(Status.RUNNING)
    await bench.journal.settled()
    async with aclosing(bench.follow(silence_s=0.02)) as items:
        assert isinstance(await anext(items), Event)
        assert await anext(items) == Silence()
        assert await anext(items) == Silence()


async def test_a_reader_that_goes_is_forgotten(bench: Bench) -> None:
    bench.live.to(Status.RUNNING)
    await bench.journal.settled()
    assert bench.log is not None
    async with aclosing(bench.follow()) as items:
        await anext(items)
        waiting = asyncio.create_task(anext(items))
        await asyncio.sleep(0.05)
        assert bench.log.readers == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert bench.log.readers == 0


async def test_a_job_that_went_on_in_another_process_gives_ids_that_no_reader_has_seen() -> None:
    assert next_epoch(0) == ID_EPOCH
    assert next_epoch(ID_EPOCH - 1) == ID_EPOCH
    assert next_epoch(ID_EPOCH) == 2 * ID_EPOCH


async def test_a_flood_from_a_worker_thread_arrives_whole_and_in_order_and_leaves_the_loop_free() -> None:
    got: list[object] = []
    mailbox = Mailbox(got.append)
    turns = 0

    def work() -> None:
        for number in range(20_000):
            mailbox.put(tensor(number))
            mailbox.put(progress(number, 20_000))

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        await asyncio.sleep(0.001)
        turns += 1
    await mailbox.flush()
    tensors = [item.name for item in got if isinstance(item, TensorCompleted)]
    assert tensors == [f"t{number}" for number in range(20_000)]
    told = [item for item in got if isinstance(item, Progress)]
    assert told[-1].tensors_done == 19_999
    assert len(told) < 20_000, "only the newest progress is carried"
    assert turns > 0


def test_what_the_engine_reports_becomes_data_without_empty_fields() -> None:
    copied = TensorCompleted("out", "bias", (4,), "none", 32.0, None, None, 16, 16, 0.0)
    type_, data = describe(copied)
    assert type_ == TENSOR_COMPLETED
    assert "cosine_similarity" not in data
    assert data["shape"] == [4]
    assert "eta_s" not in describe(progress(1))[1]


# --- faults ---


async def test_a_fault_of_the_journal_is_logged_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(standing, "RESTART_S", 0.01)
    bench = Bench(tmp_path)
    faults = 2

    async def write(jobs: Sequence[Job], events: Sequence[Event]) -> None:
        nonlocal faults
        faults -= 1
        if faults >= 0:
            raise KeyError("a fault")
        await asyncio.to_thread(bench.store.write, jobs, events)

    def show_badly() -> None:
        raise ValueError("another fault")

    journal = Journal(write)
    shown: list[int] = []
    event = Event(job_id="job_1", id=1, type="job.warning", at=datetime.now(UTC), data={"text": "once"})
    journal.put(Entry(None, event, lambda: shown.append(1)))
    journal.put(Entry(None, None, show_badly))
    journal.put(Entry(None, None, lambda: shown.append(3)))
    await asyncio.wait_for(journal.settled(), 60)
    assert shown == [1, 3]
    assert [stored.id for stored in bench.store.events("job_1", limit=10)] == [1]
    found = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert found == [KeyError, KeyError, ValueError]
    assert not journal.is_down
    await journal.stop()
    await bench.close()
