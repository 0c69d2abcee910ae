"""The store: what is written is there after a restart, in order, for one process at a time."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import combinations as combinations_of
from pathlib import Path

import pytest
import uuid_utils

from service.errors import DiskFull, StorageFailure
from service.jobs import count_table, retention_table
from service.jobs.collector import Look
from service.jobs.events import Event
from service.jobs.job import Artifact, Job, Status
from service.jobs.quotas import Usage
from service.jobs.record import to_record
from service.jobs.store import DATABASE, MIGRATIONS, Store
from service.jobs.tenant import DEFAULT_TENANT
from service.jobs.times import text_of, time_of
from tests.jobs.models import quantize_request

START = datetime(2026, 1, 1, tzinfo=UTC)


def a_job(tenant: str = DEFAULT_TENANT, **fields: object) -> Job:
    now = datetime.now(UTC)
    request = quantize_request(Path("/models/a"), **fields)
    return Job(f"job_{uuid_utils.uuid7()}", request, {}, Status.QUEUED, now, tenant=tenant)


def event(job: Job, id_: int, type_: str = "tensor.completed", seconds: float = 0.0) -> Event:
    return Event(id_, type_, job.id, START + timedelta(seconds=seconds), {"name": f"t{id_}"})


def erase(store: Store, job: Job) -> None:
    with store.transaction() as db:
        assert not retention_table.erase(db, job.id, START, 100), "all at once"


@pytest.fixture
def store(tmp_path: Path):
    opened = Store(tmp_path)
    yield opened
    opened.close()


def test_a_job_and_its_events_are_there_after_reopening(tmp_path: Path) -> None:
    job = a_job(labels={"model": "minilm"})
    first = Store(tmp_path)
    first.add(job, [event(job, 1)])
    running = job.to(Status.RUNNING)
    first.write([running], [event(job, 2), event(job, 3)])
    first.close()
    second = Store(tmp_path)
    assert second.get(job.id) == running
    assert [e.id for e in second.events(job.id)] == [1, 2, 3]
    assert second.active() == [running]
    second.close()


def test_what_is_written_says_whether_a_webhook_is_to_be_told(store: Store) -> None:
    asking = a_job(webhook={"url": "https://example.org/hook", "events": ["job.succeeded"]})
    silent = a_job()
    assert not store.add_all([asking, silent], [event(asking, 1, "job.queued"), event(silent, 1, "job.queued")])
    running = [job.to(Status.RUNNING) for job in (asking, silent)]
    assert not store.write(running, [event(job, 2, "job.running") for job in running])
    ended = [job.to(Status.SUCCEEDED) for job in running]
    assert not store.write(ended[1:], [event(silent, 3, "job.succeeded")])
    last = replace(event(asking, 3, "job.succeeded"), data={"status": "succeeded"})
    assert store.write(ended[:1], [last, event(asking, 4)])


def test_jobs_come_newest_first_in_pages_that_neither_skip_nor_repeat(store: Store) -> None:
    jobs = [a_job() for _ in range(25)]
    for job in jobs:
        store.add(job, [])
    found: list[Job] = []
    cursor: str | None = None
    for _ in range(3):
        page, cursor = store.find(limit=10, after=cursor)
        found += page
    assert [job.id for job in found] == [job.id for job in reversed(jobs)]
    assert cursor is None


def test_a_job_that_comes_between_two_pages_disturbs_neither(store: Store) -> None:
    jobs = [a_job() for _ in range(4)]
    for job in jobs:
        store.add(job, [])
    first, cursor = store.find(limit=2)
    store.add(a_job(), [])
    second, _ = store.find(limit=2, after=cursor)
    assert [job.id for job in first + second] == [job.id for job in reversed(jobs)]


def test_filters_hold_alone_and_together(store: Store) -> None:
    plain, labelled, other = a_job(), a_job(labels={"team": "a", "x": "1"}), a_job(labels={"team": "b"})
    for job in (plain, labelled, other):
        store.add(job, [])
    store.write([labelled.to(Status.RUNNING)], [])

    def ids(**filters: object) -> set[str]:
        return {job.id for job in store.find(**filters)[0]}

    assert ids(label=("team", "a")) == {labelled.id}
    assert ids(label=("team", "c")) == set()
    assert ids(status=Status.QUEUED) == {plain.id, other.id}
    assert ids(status=Status.RUNNING, label=("team", "a"), kind="quantize") == {labelled.id}
    assert ids(kind="validate") == set()
    assert ids(created_after=plain.created_at) == {labelled.id, other.id}
    assert ids(created_after=other.created_at) == set()


FILTERS: dict[str, object] = {
    "tenant": "a",
    "status": Status.RUNNING,
    "kind": "quantize",
    "batch_id": "batch_0",
    "label": ("a", "b"),
    "created_after": START,
    "after": "job_f",
}


def test_whatever_is_asked_for_a_page_is_found_by_an_index_that_holds_all_of_it_and_sorts(store: Store) -> None:
    """In a batch, which is small, its own index is enough; else each filter has to narrow the search."""
    statements: list[str] = []
    combinations = [
        dict(chosen) for size in range(len(FILTERS) + 1) for chosen in combinations_of(FILTERS.items(), size)
    ]
    for filters in combinations:
        statements.clear()
        store._db.set_trace_callback(statements.append)
        store.find(**filters)  # type: ignore[arg-type]
        store._db.set_trace_callback(None)
        steps = [row[3] for row in store._db.execute(f"EXPLAIN QUERY PLAN {statements[0]}")]
        print(filters, steps)
        if filters:
            assert not any("SCAN" in step for step in steps), filters
        assert not any("TEMP B-TREE" in step for step in steps), filters
        if "batch_id" in filters:
            assert "jobs_by_batch (batch_id=?" in steps[0]
            continue
        used = {"tenant", "status", "kind"} & filters.keys()
        assert all(f"{name}=?" in steps[0] for name in used), (filters, steps)
        if "label" in filters:
            assert "key=? AND value=?" in steps[0], (filters, steps)
        if "created_after" in filters:
            assert "id>?" in steps[0], (filters, steps)
        if "after" in filters:
            assert "id<?" in steps[0], (filters, steps)
    assert len(combinations) == 2 ** len(FILTERS)


def test_a_label_finds_jobs_by_the_status_that_they_have_now(store: Store) -> None:
    jobs = [a_job(labels={"team": "a"}) for _ in range(3)]
    for job in jobs:
        store.add(job, [])
    store.write([jobs[1].to(Status.RUNNING)], [])
    for status, expected in ((Status.QUEUED, {jobs[0].id, jobs[2].id}), (Status.RUNNING, {jobs[1].id})):
        assert {job.id for job in store.find(label=("team", "a"), status=status)[0]} == expected


@pytest.mark.parametrize("look", [retention_table.old_jobs, retention_table.old_artifacts, retention_table.old_logs])
def test_what_is_old_is_found_by_an_index(store: Store, look: Look) -> None:
    statements: list[str] = []
    store._db.set_trace_callback(statements.append)
    look(store._db, "2026", ("2025", "job_f"), 10)
    store._db.set_trace_callback(None)
    steps = [row[3] for row in store._db.execute(f"EXPLAIN QUERY PLAN {statements[0]}")]
    assert "SEARCH jobs USING INDEX" in steps[0]
    assert "kept_since" in steps[0]
    assert not any("SCAN" in step or "TEMP B-TREE" in step for step in steps)


def test_a_second_process_is_refused_until_the_first_has_closed(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from service.jobs.store import Store; Store(Path(sys.argv[1])).close()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    store = Store(tmp_path)
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "in use by another server (process " in refused.stderr
    store.close()
    assert subprocess.run(command, check=False).returncode == 0


def test_a_folder_of_a_newer_version_is_refused_and_let_go_of(tmp_path: Path) -> None:
    Store(tmp_path).close()
    db = sqlite3.connect(tmp_path / DATABASE)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    for _ in range(2):
        with pytest.raises(StorageFailure, match="newer version"):
            Store(tmp_path)


def test_deleting_a_job_takes_its_events_and_labels_along(store: Store) -> None:
    job = a_job(labels={"team": "a"})
    store.add(job, [event(job, 1)])
    erase(store, job)
    assert store.get(job.id) is None
    assert store.events(job.id) == []
    assert store.find(label=("team", "a")) == ([], None)


def test_a_write_that_fails_leaves_nothing_of_itself(store: Store) -> None:
    job = a_job()
    store.add(job, [event(job, 1)])
    with pytest.raises(StorageFailure):
        store.write([job.to(Status.RUNNING)], [event(job, 2), event(job, 1)])
    assert store.get(job.id) == job
    assert [e.id for e in store.events(job.id)] == [1]


def test_a_full_disk_is_named_as_such_and_the_store_works_on_when_there_is_room(store: Store) -> None:
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    big = a_job(labels={f"k{i}": "v" * 100 for i in range(32)})
    with pytest.raises(DiskFull):
        store.add(big, [event(big, i) for i in range(1, 500)])
    assert store.get(big.id) is None
    store._db.execute("PRAGMA max_page_count = 100000")
    store.add(big, [])
    assert store.get(big.id) == big


def test_threads_may_share_it(store: Store) -> None:
    jobs = [[a_job() for _ in range(20)] for _ in range(4)]

    def work(mine: list[Job]) -> None:
        for job in mine:
            store.add(job, [event(job, 1)])
            store.write([job.to(Status.RUNNING)], [event(job, 2)])
            assert [e.id for e in store.events(job.id)] == [1, 2]

    threads = [threading.Thread(target=work, args=(mine,)) for mine in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.active()) == 80


def test_a_tenant_finds_its_own_jobs_alone_and_everybody_else_all(store: Store) -> None:
    mine, theirs = a_job(tenant="a", labels={"k": "v"}), a_job(tenant="b", labels={"k": "v"})
    for job in (mine, theirs):
        store.add(job, [])
    assert store.get(mine.id, "a") == mine
    assert store.get(theirs.id, "a") is None
    for label in (None, ("k", "v")):
        assert store.find(tenant="a", label=label) == ([mine], None)
        assert store.find(label=label) == ([theirs, mine], None)


def test_jobs_are_counted_by_status_without_looking_at_them(store: Store) -> None:
    jobs = [a_job() for _ in range(6)]
    store.add_all(jobs, [])
    store.write([job.to(Status.RUNNING) for job in jobs[:4]], [])
    store.write([job.to(Status.RUNNING).to(Status.FAILED) for job in jobs[:3]], [])
    store.write([jobs[5]], [])
    erase(store, jobs[0])
    with store.reading() as db:
        assert count_table.read(db) == {"queued": 2, "running": 1, "failed": 2}
        assert count_table.read(db) == dict(db.execute("SELECT status, count(*) FROM jobs GROUP BY status"))


def test_a_database_of_the_first_schema_becomes_one_with_tenants(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / DATABASE)
    db.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
    job = a_job(labels={"model": "minilm"})
    places = (("safetensors", 700, f"/data/artifacts/{job.id}/safetensors/x"), ("parquet", 90, "/elsewhere/x"))
    files = tuple(Artifact(f"{name}/x", size, "0", "", place) for name, size, place in places)
    record = to_record(replace(job, artifacts=files))
    row = (job.id, job.request.kind, job.status, job.created_at.isoformat(), record)
    db.execute("INSERT INTO jobs (id, kind, status, created_at, record) VALUES (?, ?, ?, ?, ?)", row)
    db.execute("INSERT INTO labels (key, value, job_id) VALUES ('model', 'minilm', ?)", (job.id,))
    db.commit()
    db.close()
    store = Store(tmp_path)
    (found,), _ = store.find(tenant=DEFAULT_TENANT, label=("model", "minilm"))
    assert found.id == job.id
    assert found.tenant == DEFAULT_TENANT
    assert store.usage(DEFAULT_TENANT).stored_bytes == 700
    with store.reading() as opened:
        assert count_table.read(opened) == {"queued": 1}
    erase(store, job)
    assert store.usage(DEFAULT_TENANT).stored_bytes == 0
    store.close()


def test_stored_bytes_are_those_of_files_in_the_data_folder(store: Store) -> None:
    outputs = [{"format": "safetensors"}, {"format": "parquet", "uri": "file:///elsewhere"}]
    job = a_job(outputs=outputs, tenant="a").to(Status.RUNNING)
    store.add(job, [])
    files = tuple(Artifact(f"{name}/x", size, "0", "", "") for name, size in (("safetensors", 3), ("parquet", 4)))
    store.write([job.to(Status.SUCCEEDED, artifacts=files)], [])
    assert store.usage("a") == Usage(3)
    assert store.usage("b") == Usage()


def test_texts_of_times_sort_as_the_times_do_also_beside_those_of_earlier_versions() -> None:
    whole = datetime(2026, 6, 1, 12, 0, 0, tzinfo=UTC)
    times = [whole - timedelta(microseconds=1), whole, whole + timedelta(microseconds=1), whole + timedelta(seconds=1)]
    texts = [text_of(time.astimezone(timezone(timedelta(hours=2)))) for time in times]
    assert texts == sorted(set(texts))
    assert [time_of(text) for text in texts] == times
    assert texts[0] < whole.isoformat() <= texts[1]
