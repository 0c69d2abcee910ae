"""Retention: what is too old or too much goes, oldest first, never while it is used, and nothing by halves."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from service.errors import ArtifactsExpired, JobInUse, ModelNotFound, NotFound, StorageFailure
from service.jobs import batch_table, blob_table, retention_table, standing
from service.jobs.batch import Batch
from service.jobs.collector import Collector
from service.jobs.folders import REPORT, Folders
from service.jobs.job import Job, Status
from service.jobs.manager import JobManager
from service.jobs.offline import sweep_folder
from service.jobs.request import BatchRequest
from service.jobs.retention import Rules, Swept, What, Why, before
from service.jobs.store import DATABASE, MIGRATIONS, Store
from service.jobs.tenant import DEFAULT_TENANT
from service.storage.upload import BlobFiles, owner_of
from tests.conftest import SEED
from tests.jobs.conftest import MakeManager
from tests.jobs.kept import NOW, OUTPUT, SIZE, ago, keep_job
from tests.jobs.models import digests, make_model, make_slow_model, quantize_request, validate_request
from tests.jobs.test_restart import REPOSITORY

FOR_EVER = Rules(blob_ttl_s=None)
DAY = 86400.0
TWO = 2 * SIZE


@contextmanager
def opened(data_dir: Path) -> Iterator[Store]:
    store = Store(data_dir)
    try:
        yield store
    finally:
        store.close()


def sweep(data_dir: Path, *, dry_run: bool = False, **rules: Any) -> Swept:
    """As `arrowquant gc` does it where no server runs, at NOW."""
    return sweep_folder(data_dir, replace(FOR_EVER, **rules), NOW, dry_run=dry_run)


def names(swept: Swept) -> list[tuple[What, Why, str]]:
    return [(item.what, item.why, item.id) for item in swept.named]


def outputs_of(data_dir: Path, job: Job) -> Path:
    return Folders(data_dir).artifacts(job.id) / OUTPUT


# --- by age ---


def test_without_rules_everything_stays_for_ever(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        job = keep_job(tmp_path, store, age_s=1000 * DAY)
    assert sweep(tmp_path).count == 0
    with opened(tmp_path) as store:
        assert store.get(job.id) == job


def test_artifacts_go_by_age_and_the_job_its_report_and_its_log_stay(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        old, young = (keep_job(tmp_path, store, age_s=age, tenant="ada") for age in (DAY + 1, DAY - 1))
        assert store.usage("ada").stored_bytes == 2 * TWO
    swept = sweep(tmp_path, artifact_ttl_s=DAY)
    assert names(swept) == [(What.ARTIFACTS, Why.AGE, old.id)]
    assert swept.size_bytes == TWO
    with opened(tmp_path) as store:
        found = store.get(old.id)
        assert found == replace(old, artifacts_expired_at=NOW)
        assert store.get(young.id) == young
        assert store.usage("ada").stored_bytes == TWO
        assert len(store.events(old.id)) == 5
    assert [path.name for path in Folders(tmp_path).artifacts(old.id).iterdir()] == [REPORT]
    assert len(list(outputs_of(tmp_path, young).iterdir())) == 2
    assert sweep(tmp_path, artifact_ttl_s=DAY).count == 0, "once is enough"


def test_what_was_written_to_an_address_of_its_own_never_expires(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    outputs = [{"format": OUTPUT, "uri": theirs.as_uri()}]
    with opened(tmp_path / "data") as store:
        job = keep_job(tmp_path / "data", store, age_s=2 * DAY, outputs=outputs)
    assert sweep(tmp_path / "data", artifact_ttl_s=DAY).count == 0
    with opened(tmp_path / "data") as store:
        found = store.get(job.id)
    assert found is not None
    assert found.artifacts_expired_at is None
    assert all(found.is_kept(artifact) for artifact in replace(found, artifacts_expired_at=NOW).artifacts)


def test_a_log_goes_but_for_its_end_however_long_it_is(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        long, short = (keep_job(tmp_path, store, age_s=2 * DAY, events=count) for count in (5000, 2))
    assert sweep(tmp_path, event_ttl_s=DAY).tallies[What.EVENTS].count == 2
    with opened(tmp_path) as store:
        for job, last in ((long, 5000), (short, 2)):
            (event,) = store.events(job.id)
            assert (event.id, event.type) == (last, "job.succeeded")
            assert event.job == replace(job, events_expired_at=NOW)
    assert sweep(tmp_path, event_ttl_s=DAY).count == 0


def test_a_job_goes_with_all_that_is_its(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        old, young = (keep_job(tmp_path, store, age_s=age, events=900, labels={"a": "b"}) for age in (2 * DAY, 1))
    swept = sweep(tmp_path, job_ttl_s=DAY, artifact_ttl_s=DAY, event_ttl_s=DAY)
    assert names(swept) == [(What.JOBS, Why.AGE, old.id)]
    with opened(tmp_path) as store:
        assert store.get(old.id) is None
        assert store.find(label=("a", "b"))[0] == [young]
        assert len(store.events(young.id)) == 900
        assert store.usage(DEFAULT_TENANT).stored_bytes == TWO
        with store.reading() as db:
            counts = [db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("events", "removals")]
    assert counts == [900, 0]
    assert not Folders(tmp_path).artifacts(old.id).exists()


def test_a_job_whose_webhook_is_still_to_be_told_stays(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        job = keep_job(tmp_path, store, age_s=2 * DAY, webhook={"url": "https://example.org/hook"})
    assert sweep(tmp_path, job_ttl_s=DAY).count == 0
    with opened(tmp_path) as store, store.transaction() as db:
        assert db.execute("UPDATE webhook_deliveries SET status = 'delivered'").rowcount > 0
    assert names(sweep(tmp_path, job_ttl_s=DAY)) == [(What.JOBS, Why.AGE, job.id)]
    with opened(tmp_path) as store, store.reading() as db:
        assert db.execute("SELECT count(*) FROM webhook_deliveries").fetchone() == (0,)


@pytest.mark.parametrize(
    ("rule", "gone"),
    [
        ({"artifact_ttl_s": DAY}, What.ARTIFACTS),
        ({"event_ttl_s": DAY}, What.EVENTS),
        ({"max_total_bytes": 0}, What.ARTIFACTS),
    ],
)
def test_what_a_webhook_is_still_to_tell_of_is_there_when_it_has_told(
    tmp_path: Path, rule: dict[str, float], gone: What
) -> None:
    with opened(tmp_path) as store:
        job = keep_job(tmp_path, store, age_s=2 * DAY, webhook={"url": "https://example.org/hook"})
    assert sweep(tmp_path, **rule).count == 0
    with opened(tmp_path) as store, store.transaction() as db:
        db.execute("UPDATE webhook_deliveries SET status = 'delivered'")
    assert (gone, job.id) in [(item.what, item.id) for item in sweep(tmp_path, **rule).named]


def test_a_batch_ages_as_a_whole_and_goes_with_its_last_job(tmp_path: Path) -> None:
    ids = [f"batch_{index}" for index in range(2)]
    with opened(tmp_path) as store:
        old, open_ = (
            keep_job(tmp_path, store, age_s=2 * DAY, batch=Batch(id_, DEFAULT_TENANT, {}, ("job",), ago(2 * DAY)))
            for id_ in ids
        )
        with store.transaction() as db:  # as if another job of the batch had not ended
            db.execute("UPDATE batches SET finished_at = NULL WHERE id = ?", (ids[1],))
            db.execute("UPDATE jobs SET kept_since = NULL WHERE batch_id = ?", (ids[1],))
    assert names(sweep(tmp_path, artifact_ttl_s=DAY)) == [(What.ARTIFACTS, Why.AGE, old.id)]
    assert sweep(tmp_path, event_ttl_s=DAY).count == 1
    with opened(tmp_path) as store, store.reading() as db:
        assert [e.type for e in batch_table.events(db, ids[0], after=0, limit=9)] == ["job.succeeded"]
        assert len(batch_table.events(db, ids[1], after=0, limit=9)) == 5
    assert names(sweep(tmp_path, job_ttl_s=DAY)) == [(What.JOBS, Why.AGE, old.id)]
    with opened(tmp_path) as store, store.reading() as db:
        assert [batch.id for batch in batch_table.find(db, tenant=None, limit=9, after=None)[0]] == [ids[1]]
        assert db.execute("SELECT count(*) FROM batch_events").fetchone() == (5,)
        assert store.get(open_.id) == open_


# --- by size ---


#: Files of one job, so many that a page more or less of the database does not count.
MANY = 100


def beside_the_database(data_dir: Path, files_bytes: int) -> int:
    """A total that leaves so much to files."""
    with opened(data_dir) as store, store.reading() as db:
        return retention_table.own_bytes(db) + files_bytes + MANY * SIZE // 2


def test_beyond_the_total_the_oldest_go_and_no_more_than_needed(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        jobs = [keep_job(tmp_path, store, age_s=hours * 3600, files=MANY) for hours in (3, 5, 1, 4, 2)]
    room = beside_the_database(tmp_path, 2 * MANY * SIZE)
    assert names(sweep(tmp_path, max_total_bytes=room)) == [(What.ARTIFACTS, Why.SIZE, jobs[i].id) for i in (1, 3, 0)]
    assert sweep(tmp_path, max_total_bytes=room).count == 0
    with opened(tmp_path) as store:
        assert store.usage(DEFAULT_TENANT).stored_bytes == 2 * MANY * SIZE


def test_when_files_do_not_suffice_the_oldest_logs_go_and_then_the_oldest_records(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        jobs = [keep_job(tmp_path, store, age_s=hours * 3600, events=3000) for hours in (3, 5, 1, 4, 2)]
        young = keep_job(tmp_path, store, age_s=60, events=3000)
    by_age = [jobs[i].id for i in (1, 3, 0, 4, 2)]
    with opened(tmp_path) as store, store.reading() as db:
        log = retention_table.log_bytes(db, young.id)
        room = retention_table.own_bytes(db) - 3 * log // 2
    shown, done = (sweep(tmp_path, dry_run=dry_run, max_total_bytes=room) for dry_run in (True, False))
    assert names(shown) == names(done)
    files = [(What.ARTIFACTS, Why.SIZE, job_id) for job_id in by_age]
    assert names(done) == files + [(What.EVENTS, Why.SIZE, job_id) for job_id in by_age[:2]]
    swept = sweep(tmp_path, max_total_bytes=0)
    assert names(swept) == [
        *((What.EVENTS, Why.SIZE, job_id) for job_id in by_age[2:]),
        *((What.JOBS, Why.SIZE, job_id) for job_id in by_age),
    ]
    with opened(tmp_path) as store:
        assert [job.id for job in store.find()[0]] == [young.id]
        assert len(store.events(young.id, limit=9999)) == 3000
        assert (tmp_path / DATABASE).stat().st_size < 4 * log


def test_an_upload_that_stands_still_counts_and_goes_in_its_turn(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        old, young = (keep_job(tmp_path, store, age_s=hours * 3600, files=MANY) for hours in (5, 1))
    files = BlobFiles(tmp_path / "blobs")
    files.create()
    for digest, age_s in (("b3", 3 * 3600), ("b0", 60)):
        part = files.open_part(owner_of("ada"), digest)
        part.write(bytes(MANY * SIZE))
        part.close()
        at = ago(age_s).timestamp()
        os.utime(part.path, (at, at))
    room = beside_the_database(tmp_path, 2 * MANY * SIZE)
    for dry_run in (True, False):
        swept = sweep(tmp_path, max_total_bytes=room, dry_run=dry_run)
        assert names(swept) == [(What.ARTIFACTS, Why.SIZE, old.id), (What.UPLOADS, Why.SIZE, "b3")]
    assert [part.digest for part in files.parts()] == ["b0"]
    assert outputs_of(tmp_path, young).exists()


def test_what_has_just_ended_is_not_taken_for_room(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        young = keep_job(tmp_path, store, age_s=599)
        old = keep_job(tmp_path, store, age_s=601)
    assert {item.id for item in sweep(tmp_path, max_total_bytes=0).named} == {old.id}
    with opened(tmp_path) as store:
        assert [job.id for job in store.find()[0]] == [young.id]
        assert len(store.events(young.id)) == 5


def test_blobs_and_artifacts_go_in_one_order(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        jobs = [keep_job(tmp_path, store, age_s=hours * 3600, files=MANY) for hours in (8, 6, 4)]
        with store.transaction() as db:
            for digest, hours in (("b7", 7), ("b5", 5), ("b3", 3)):
                blob_table.add(db, "ada", digest, MANY * SIZE)
                at = ago(hours * 3600).isoformat(timespec="microseconds")
                db.execute("UPDATE blobs SET last_used_at = ? WHERE digest = ?", (at, digest))
    room = beside_the_database(tmp_path, 2 * MANY * SIZE)
    for dry_run in (True, False):
        swept = sweep(tmp_path, max_total_bytes=room, dry_run=dry_run)
        assert [item.id for item in swept.named] == [jobs[0].id, "b7", jobs[1].id, "b5"]
    with opened(tmp_path) as store:
        assert store.usage("ada").stored_bytes == MANY * SIZE


def test_what_goes_by_age_makes_room_first_also_where_it_is_only_shown(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        jobs = [keep_job(tmp_path, store, age_s=days * DAY, files=MANY) for days in (4, 3, 2, 1)]
    room = beside_the_database(tmp_path, MANY * SIZE)
    rules = {"job_ttl_s": 3.5 * DAY, "artifact_ttl_s": 2.5 * DAY, "max_total_bytes": room}
    shown, done = (sweep(tmp_path, dry_run=dry_run, **rules) for dry_run in (True, False))
    assert names(shown) == names(done)
    assert names(done) == [
        (What.JOBS, Why.AGE, jobs[0].id),
        (What.ARTIFACTS, Why.AGE, jobs[1].id),
        (What.ARTIFACTS, Why.SIZE, jobs[2].id),
    ]


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for _ in range(3):
            keep_job(tmp_path, store, age_s=2 * DAY)
        dump = list(store._db.iterdump())
    files = digests(tmp_path / "artifacts")
    assert sweep(tmp_path, dry_run=True, job_ttl_s=DAY).count == 3
    assert sweep(tmp_path, dry_run=True, artifact_ttl_s=DAY, event_ttl_s=DAY, max_total_bytes=0).count == 9
    with opened(tmp_path) as store:
        assert list(store._db.iterdump()) == dump
    assert digests(tmp_path / "artifacts") == files


def test_a_dry_run_leaves_an_old_schema_and_what_a_crash_left_as_they_are(tmp_path: Path) -> None:
    orphan = tmp_path / "blobs" / "sha256" / "ab" / ("ab" * 32)
    orphan.parent.mkdir(parents=True)
    orphan.touch()
    db = sqlite3.connect(tmp_path / DATABASE)
    db.execute("PRAGMA journal_mode = WAL")
    for number, script in enumerate(MIGRATIONS[:4], start=1):
        db.executescript(f"{script}; PRAGMA user_version = {number};")
    with pytest.raises(StorageFailure, match="without --dry-run"):
        sweep(tmp_path, dry_run=True, job_ttl_s=DAY)
    assert db.execute("PRAGMA user_version").fetchone() == (4,)
    db.close()
    for dry_run, is_left in ((False, False), (True, True)):
        assert sweep(tmp_path, dry_run=dry_run, job_ttl_s=DAY).count == 0
        assert orphan.exists() is is_left
        orphan.touch()


# --- in use ---


async def test_what_a_job_that_has_not_ended_reads_stays_and_then_goes(
    make_manager: MakeManager, root: Path, tmp_path: Path
) -> None:
    manager = await make_manager(max_running_jobs=1)
    source = await manager.jobs.wait(
        (await manager.submit(quantize_request(make_model(root / "m.safetensors")))).id, 60
    )
    slow = await manager.submit(quantize_request(make_slow_model(root / "slow.safetensors"), config={"method": "mse"}))
    compare = {
        "kind": "validate",
        "original": {"type": "uri", "uri": (root / "m.safetensors").as_uri()},
        "quantized": {"type": "job", "job_id": source.id},
    }
    (waiting,) = (await manager.submit_batch(BatchRequest.model_validate({"items": [compare]}))).job_ids
    rules = replace(FOR_EVER, artifact_ttl_s=0.0, event_ttl_s=0.0, job_ttl_s=0.0)
    assert (await manager.collector.sweep(rules, later(source))).count == 0
    await manager.cancel(slow.id)
    assert (await manager.jobs.wait(waiting, 60)).status is Status.SUCCEEDED
    swept = await manager.collector.sweep(replace(rules, job_ttl_s=None), later(source))
    assert [item.id for item in swept.named if item.what is What.ARTIFACTS] == [source.id]
    with pytest.raises(ArtifactsExpired) as refused:
        await manager.submit(quantize_request({"type": "job", "job_id": source.id}))
    assert refused.value.pointer == "/source/job_id"
    assert (await manager.jobs.report(source.id)).outputs
    assert (await manager.collector.sweep(rules, later(source))).tallies[What.JOBS].count == 3
    assert (await manager.jobs.find(), await manager.batches.find()) == (([], None), ([], None))
    assert list((tmp_path / "data" / "artifacts").iterdir()) == []


async def test_the_source_of_a_job_that_has_not_ended_cannot_be_purged(make_manager: MakeManager, root: Path) -> None:
    manager = await make_manager(max_running_jobs=1)
    model = make_model(root / "m.safetensors")
    batch = await manager.submit_batch(BatchRequest(items=[quantize_request(model)] * 2))
    await manager.batches.wait(batch.id, 60)
    other, source = batch.job_ids
    slow = await manager.submit(quantize_request(make_slow_model(root / "slow.safetensors"), config={"method": "mse"}))
    waiting = await manager.submit(validate_request(model, source))
    for purge in (manager.purge(source), manager.batches.purge(batch.id)):
        with pytest.raises(JobInUse, match=source):
            await purge
    assert (await manager.jobs.get(other)).status is Status.SUCCEEDED, "of a batch nothing goes then"
    await manager.drain(10)
    manager = await make_manager(max_running_jobs=1)
    with pytest.raises(JobInUse):
        await manager.purge(source)
    await manager.purge(other)
    await manager.cancel(slow.id)
    assert (await manager.jobs.wait(waiting.id, 60)).status is Status.SUCCEEDED
    await manager.batches.purge(batch.id)


async def test_a_job_that_is_submitted_while_its_source_is_purged_gets_all_of_it_or_is_refused(
    manager: JobManager, root: Path
) -> None:
    model = make_model(root / "m.safetensors")
    rng = random.Random(SEED)
    print(f"TEST_SEED={SEED}")
    purged = 0
    for _ in range(12):
        source = await manager.jobs.wait((await manager.submit(quantize_request(model))).id, 60)

        async def submit(source: Job = source, pause: float = rng.random() * 0.01) -> Job:
            await asyncio.sleep(pause)
            return await manager.jobs.wait((await manager.submit(validate_request(model, source.id))).id, 60)

        async def purge(source: Job = source, pause: float = rng.random() * 0.01) -> None:
            await asyncio.sleep(pause)
            await manager.purge(source.id)

        done, purging = await asyncio.gather(submit(), purge(), return_exceptions=True)
        assert isinstance(purging, JobInUse | None), purging
        if isinstance(done, Job):
            assert done.status is Status.SUCCEEDED, done.error
        else:
            assert isinstance(done, ModelNotFound), done
            assert purging is None
        purged += purging is None
    print(f"{purged} of 12 were purged")


async def test_a_job_that_is_submitted_while_its_source_expires_gets_all_of_it_or_is_refused(
    manager: JobManager, root: Path
) -> None:
    rules, model = replace(FOR_EVER, artifact_ttl_s=0.0), make_model(root / "m.safetensors")
    rng = random.Random(SEED)
    print(f"TEST_SEED={SEED}")
    refused = 0
    for _ in range(12):
        source = await manager.jobs.wait((await manager.submit(quantize_request(model))).id, 60)
        request = {
            "kind": "validate",
            "original": {"type": "uri", "uri": model.as_uri()},
            "quantized": {"type": "job", "job_id": source.id},
        }
        batch = BatchRequest.model_validate({"items": [request]})

        async def submit(batch: BatchRequest = batch, pause: float = rng.random() * 0.01) -> None:
            await asyncio.sleep(pause)
            (job_id,) = (await manager.submit_batch(batch)).job_ids
            done = await manager.jobs.wait(job_id, 60)
            assert done.status is Status.SUCCEEDED, done.error

        async def expire(source: Job = source, pause: float = rng.random() * 0.01) -> None:
            await asyncio.sleep(pause)
            await manager.collector.sweep(rules, later(source))

        outcomes = await asyncio.gather(submit(), expire(), return_exceptions=True)
        for outcome in filter(None, outcomes):
            assert isinstance(outcome, ArtifactsExpired), outcome
            refused += 1
    print(f"{refused} of 12 came too late")


async def test_files_that_are_read_outlive_their_record_until_the_last_reader_lets_go(
    manager: JobManager, root: Path, tmp_path: Path
) -> None:
    job = await manager.jobs.wait((await manager.submit(quantize_request(make_model(root / "m.safetensors")))).id, 60)
    folder = tmp_path / "data" / "artifacts" / job.id
    files = digests(folder)
    with manager.leases.held(job.id):
        swept = await manager.collector.sweep(replace(FOR_EVER, artifact_ttl_s=0.0), later(job))
        assert swept.count == 0, "expiry waits"
        with manager.leases.held(job.id):
            await manager.purge(job.id)
            with pytest.raises(NotFound):
                await manager.jobs.get(job.id)
        assert digests(folder) == files, "a purge does not wait, but its files do"
    for _ in range(1000):
        if not folder.exists():
            break
        await asyncio.sleep(0.01)
    assert not folder.exists()


async def test_others_get_their_turn_in_the_middle_of_a_long_log(make_manager: MakeManager, tmp_path: Path) -> None:
    with opened(tmp_path / "data") as store:
        job = keep_job(tmp_path / "data", store, age_s=DAY, events=20_000)
    manager = await make_manager()
    left: list[int] = []

    async def look() -> None:
        while True:
            page = await manager.jobs.events(job.id, limit=1)
            left.append((page[0].id or 0) if page else 0)

    looking = asyncio.create_task(look())
    await asyncio.sleep(0)
    await manager.purge(job.id)
    await manager.jobs.events(job.id, limit=1)
    looking.cancel()
    steps = [first for first in dict.fromkeys(left) if 1 < first < 20_000]
    print(f"{len(left)} looks saw {len(steps)} states in between")
    assert len(steps) > 3


# --- space ---


def test_the_database_gives_its_space_back(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for _ in range(4):
            keep_job(tmp_path, store, age_s=2 * DAY, events=10_000)
    file = tmp_path / DATABASE
    full = file.stat().st_size
    sweep(tmp_path, job_ttl_s=DAY)
    assert file.stat().st_size < full / 3
    wal = file.with_name(f"{DATABASE}-wal")
    assert not wal.exists() or wal.stat().st_size == 0


def test_an_old_database_learns_to_give_space_back_where_no_server_runs(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / DATABASE)
    db.execute("PRAGMA journal_mode = WAL")
    for number, script in enumerate(MIGRATIONS[:4], start=1):
        db.executescript(f"{script}; PRAGMA user_version = {number};")
    db.close()
    with opened(tmp_path) as store:
        assert store._db.execute("PRAGMA auto_vacuum").fetchone() == (0,)
        job = keep_job(tmp_path, store, age_s=2 * DAY)
    sweep(tmp_path, artifact_ttl_s=DAY)
    with opened(tmp_path) as store:
        assert store._db.execute("PRAGMA auto_vacuum").fetchone() == (2,)
        assert store.get(job.id) == replace(job, artifacts_expired_at=NOW)


# --- faults ---

SWEEP = """
import sys
from pathlib import Path
from dataclasses import replace
from tests.jobs.test_retention import FOR_EVER, NOW, sweep
print("ready", flush=True)
sweep(Path(sys.argv[1]), **{sys.argv[2]: 1.0})
"""


@pytest.mark.parametrize("rule", ["artifact_ttl_s", "job_ttl_s"])
def test_a_kill_at_any_moment_of_a_sweep_leaves_artifacts_whole_or_not_listed(tmp_path: Path, rule: str) -> None:
    data_dir = tmp_path / "data"
    with opened(data_dir) as store:
        jobs = [keep_job(data_dir, store, age_s=DAY, files=3) for _ in range(800)]
    rng = random.Random(SEED)
    print(f"TEST_SEED={SEED}")
    listed = len(jobs)
    moments = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", SWEEP, str(data_dir), rule], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.02, 0.3))
        process.kill()
        process.communicate()
        before_, listed = listed, _check_whole(data_dir, jobs)
        moments += before_ > listed > 0
    print(f"{moments} kills came in the middle; {listed} of {len(jobs)} jobs still list their files")
    asyncio.run(_start_and_stop(data_dir))
    kept = [job for job in jobs if outputs_of(data_dir, job).exists()]
    assert len(kept) == listed, "the next start removes what the kill left"


def _check_whole(data_dir: Path, jobs: list[Job]) -> int:
    """How many jobs list files, which all have to be there."""
    listed = 0
    with opened(data_dir) as store:
        for job in jobs:
            found = store.get(job.id)
            if found is None or found.artifacts_expired_at is not None:
                continue
            listed += 1
            assert all(Path(artifact.location).stat().st_size == SIZE for artifact in found.artifacts)
    return listed


async def _start_and_stop(data_dir: Path) -> None:
    manager = JobManager(data_dir=data_dir, retention=FOR_EVER)
    await manager.start()
    await manager.drain(10)


def test_files_that_cannot_be_removed_are_tried_again(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        job = keep_job(tmp_path, store, age_s=2 * DAY)
        with store.transaction() as db:  # as a sweep that was killed behind its transaction
            db.execute("INSERT INTO removals (job_id, keeps_report) VALUES (?, 1)", (job.id,))
    sweep(tmp_path)
    assert not outputs_of(tmp_path, job).exists()
    with opened(tmp_path) as store, store.reading() as db:
        assert db.execute("SELECT count(*) FROM removals").fetchone() == (0,)


@pytest.mark.parametrize("seconds", [1e9, 1e12, 1e300])
def test_a_time_beyond_the_calendar_is_for_ever(seconds: float) -> None:
    found = before(NOW, seconds)
    assert found is None or found < ago(DAY).isoformat()


def later(job: Job) -> Any:
    """A moment after all that has happened so far."""
    assert job.finished_at is not None
    return job.finished_at + timedelta(days=1)


async def test_a_fault_of_one_sweep_does_not_end_those_that_would_follow(
    make_manager: MakeManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sweep, sweeps = Collector.sweep, 0

    async def sweep_at_last(*arguments: Any, **options: Any) -> Swept:
        nonlocal sweeps
        sweeps += 1
        if sweeps == 1:
            raise KeyError("a fault")
        return await sweep(*arguments, **options)

    monkeypatch.setattr(Collector, "sweep", sweep_at_last)
    monkeypatch.setattr(standing, "RESTART_S", 0.01)
    with opened(tmp_path / "data") as store:
        old = keep_job(tmp_path / "data", store, age_s=DAY)
    manager = await make_manager(retention=Rules(job_ttl_s=0.1))
    async with asyncio.timeout(60):
        while True:
            try:
                await manager.jobs.get(old.id)
            except NotFound:
                break
            await asyncio.sleep(0.01)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError]
