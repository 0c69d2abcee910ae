"""The store with 100, 10,000 and 1,000,000 jobs: whether what is asked of it costs the same, and what a start takes."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from bench.charts import Bar, Chart
from bench.common import MIB, Samples, note, seconds, table, write_result
from bench.models import scratch
from bench.resident import anonymous_bytes
from service.jobs import batch_table, retention_table
from service.jobs.batch import Batch
from service.jobs.blobs import BlobLimits, Blobs
from service.jobs.collector import Collector
from service.jobs.database import Database
from service.jobs.events import Event
from service.jobs.folders import Folders
from service.jobs.job import Artifact, Job, Status
from service.jobs.leases import Leases
from service.jobs.orphans import remove_orphans
from service.jobs.record import to_record
from service.jobs.removal import Removals
from service.jobs.request import QuantizeRequest, ValidateRequest
from service.jobs.retention import Rules
from service.jobs.store import DATABASE, Store
from service.jobs.tenant import DEFAULT_TENANT
from service.storage.store_options import StoreOptions
from service.storage.stores import Stores

SIZES = (100, 10_000, 1_000_000)
REPEATS = 200
SEED = 20261123
#: One job in so many has a log, of so many events.
LOGGED, EVENTS = 100, 100
BATCH = 100
#: Jobs that have a folder, at most.
FOLDERED = 100_000
#: Jobs that have not ended, whatever the size.
OPEN = 20
END = datetime(2026, 6, 1, tzinfo=UTC)
STEP_MS = 1000
RARE = 37
GIB = 1 << 30
#: Where indices of a million jobs are sorted.
BUILD_CACHE_KIB = 512 << 10

ABOUT = """
Milliseconds of one call to the store, median and 99th percentile of {repeats} calls with random arguments, in one
process, on a file that is in the page cache. Pages have 50 jobs. Of the jobs 9 in 10 succeeded, and all but one in a
thousand quantize; half are of one tenant, and the rest of nine others; all have the label `team`, with one of three
values, and {rare} the label `run:rare`. One job in {logged} has a log, of {events} events, and one in ten
belongs to a batch of {batch}. {open} have not ended.

- *rare in common*: filters of which each alone fits many jobs and that together fit few or none, such as jobs that were
  cancelled with a label that a third of all have.
- *deep page*: behind a random job, as a cursor in the middle of a long list.
- *submit*: a new job with two labels and its first event, committed; *submit and end*: with its start and its end,
  three commits.
- *what to expire*: what each sweep of the retention looks at, where nothing is to be done.
- *expire one*, *delete one*: what it then does to one job, log and labels included, committed.
- *start*: from opening the file to the list of jobs to go on with, in a fresh process, and the memory (RssAnon) by
  which that process has grown; *look behind it*: how long the server then looks, beside all other calls, for files that
  belong to nobody. The newest jobs, {foldered} at most, have a folder of artifacts, which is empty; that of
  one in ten, which did not succeed, is removed.
"""

Ask = Callable[[Store, "Sample"], object]


class Sample:
    """Random ids of jobs that there are."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._rng = random.Random(SEED)

    def index(self) -> int:
        """One of the older nine tenths."""
        return self._rng.randrange(self.count * 9 // 10)

    def job_id(self) -> str:
        """Its id."""
        return job_id(self.index(), self.count)

    def logged(self) -> str:
        """A job with a log."""
        return job_id(self.index() // LOGGED * LOGGED, self.count)

    def batch_id(self) -> str:
        """A batch."""
        return batch_id(self._rng.randrange(max(1, self.count // 10 // BATCH)))

    def fresh(self) -> Job:
        """A new job."""
        now = datetime.now(UTC)
        id_ = f"job_{UUID(int=int(now.timestamp() * 1000) << 80 | self._rng.getrandbits(64))}"
        return Job(id_, _request(1), {}, Status.QUEUED, now)


def job_id(index: int, count: int) -> str:
    """The id of the job that came so many-th: ids grow with time."""
    at = int((END - timedelta(milliseconds=STEP_MS * (count - index))).timestamp() * 1000)
    return f"job_{UUID(int=at << 80 | index)}"


def batch_id(number: int) -> str:
    """The id of a batch."""
    return f"batch_{UUID(int=number)}"


QUESTIONS: dict[str, Ask] = {
    "newest page": lambda store, _: store.find(),
    "deep page": lambda store, some: store.find(after=some.job_id()),
    "status": lambda store, some: store.find(status=Status.FAILED, after=some.job_id()),
    "status, nobody there": lambda store, _: store.find(status=Status.CANCELLING),
    "kind": lambda store, some: store.find(kind="validate", after=some.job_id()),
    "label": lambda store, some: store.find(label=("team", "a"), after=some.job_id()),
    "label, rare": lambda store, _: store.find(label=("run", "rare")),
    "created_after": lambda store, _: store.find(created_after=END - timedelta(hours=1), after=None),
    "batch_id": lambda store, some: store.find(batch_id=some.batch_id()),
    "tenant": lambda store, some: store.find(tenant="t3", after=some.job_id()),
    "all of them": lambda store, some: store.find(
        tenant="t3", status=Status.SUCCEEDED, kind="quantize", label=("team", "a"), after=some.job_id()
    ),
    "rare in common: status, kind": lambda store, _: store.find(status=Status.CANCELLED, kind="validate"),
    "rare in common: label, status": lambda store, _: store.find(label=("team", "b"), status=Status.CANCELLED),
    "rare in common: label, kind": lambda store, _: store.find(label=("team", "c"), kind="validate"),
    "rare in common: tenant, label, status": lambda store, _: store.find(
        tenant="t7", label=("team", "a"), status=Status.RUNNING
    ),
    "rare in common: batch, label": lambda store, some: store.find(batch_id=some.batch_id(), label=("team", "a")),
    "get": lambda store, some: store.get(some.job_id()),
    "events, a page": lambda store, some: store.events(some.logged(), after=10, limit=50),
    "batch with its counts": lambda store, some: _batch(store, some.batch_id()),
    "usage of a tenant": lambda store, _: store.usage(DEFAULT_TENANT),
    "submit": lambda store, some: _submit(store, some.fresh()),
    "submit and end": lambda store, some: _submit_and_end(store, some.fresh()),
    "what to expire": lambda store, _: _look(store),
    "expire one": lambda store, some: _expire(store, some.job_id()),
    "trim one log": lambda store, some: _trim(store, some.logged()),
    "delete one": lambda store, some: _erase(store, some.job_id()),
}


def main(sizes: Sequence[int] = SIZES, repeats: int = REPEATS) -> None:
    """Measure, print and write the table."""
    columns: list[dict[str, Samples]] = []
    starts: list[list[str]] = []
    sweeps: list[list[str]] = []
    for size in sizes:
        with scratch(4 * GIB) as folder:
            data_dir = folder / "data"
            note(f"building {size:,} jobs")
            built_s = seconds(lambda data_dir=data_dir, size=size: build(data_dir, size))
            bytes_ = (data_dir / DATABASE).stat().st_size
            starts.append([f"{size:,}", f"{bytes_ / MIB:,.0f}", f"{built_s:.0f}", *_start(data_dir)])
            note(f"asking among {size:,} jobs")
            columns.append(_ask_all(data_dir, size, repeats))
            note(f"sweeping {size:,} jobs")
            sweeps.append([f"{size:,}", *_sweep(data_dir, size)])
    head = ("ms", *(f"{size:,}: {name}" for size in sizes for name in ("median", "p99")))
    rows = [[question, *(text for column in columns for text in _figures(column[question]))] for question in QUESTIONS]
    about = ABOUT.format(
        repeats=repeats, rare=RARE, logged=LOGGED, events=EVENTS, batch=BATCH, open=OPEN, foldered=f"{FOLDERED:,}"
    )
    start_head = ("jobs", "file, MiB", "built in, s", "start, s", "grown by, MiB", "look behind it, s")
    sweep_head = ("jobs", "dry run of all, s", "deleted", "in, s", "a read meanwhile, ms: median", "p99", "worst")
    write_result(
        "store",
        "The store at a million jobs",
        about,
        table(head, rows),
        "A start, with the jobs that have not ended to go on with:",
        table(start_head, starts),
        "A sweep that tells what would go of all jobs, and one that deletes the oldest hundredth, while another asks "
        "for a job again and again through the same thread, as calls to a server do:",
        table(sweep_head, sweeps),
        packages=("pydantic", "uuid-utils"),
        charts=[_chart(size, column) for size, column in zip(sizes, columns, strict=True)],
    )


def _chart(size: int, column: Mapping[str, Samples]) -> Chart:
    bars = [Bar(question, samples.median * 1e3) for question, samples in column.items()]
    return Chart(f"One call among {size:,} jobs, median", "ms", bars, logarithmic=True)


def build(data_dir: Path, count: int) -> None:
    """A data folder with so many jobs, by the store's own schema and triggers."""
    store = Store(data_dir)
    records = _Records()
    with store.reading() as db:
        db.execute(f"PRAGMA cache_size = -{BUILD_CACHE_KIB}")
    with store.transaction() as db, _without_indices(db):
        columns = "id, tenant, kind, status, created_at, record, batch_id, stored_bytes, kept_since"
        rows = (_row(records, index, count) for index in range(count))
        batches = range(count // 10 // BATCH)
        for number in batches:
            ids = tuple(job_id(number * BATCH * 10 + item * 10, count) for item in range(BATCH))
            batch_table.insert(db, Batch(batch_id(number), DEFAULT_TENANT, {}, ids, END))
        db.executemany(f"INSERT INTO jobs ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        db.executemany(
            "INSERT INTO labels (key, value, job_id, tenant, kind, status) VALUES (?, ?, ?, ?, ?, ?)", _labels(count)
        )
        db.executemany("INSERT INTO events (job_id, id, type, at, data) VALUES (?, ?, ?, ?, ?)", _events(count))
    store.close()
    folders = Folders(data_dir)
    folders.create()
    for index in range(max(0, count - FOLDERED), count):
        folders.artifacts(job_id(index, count)).mkdir()


@contextmanager
def _without_indices(db: sqlite3.Connection) -> Iterator[None]:
    """Have the indices made from all rows at once, so a million jobs take a minute."""
    indices = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL").fetchall()
    for name, _ in indices:
        db.execute(f"DROP INDEX {name}")
    yield
    for _, sql in indices:
        db.execute(sql)


def _figures(samples: Samples) -> list[str]:
    return [f"{s * 1e3:.2f}" for s in (samples.median, samples.percentile(99))]


class _Records:
    """Records of jobs: made once as real ones are, then with their id and times."""

    def __init__(self) -> None:
        self._templates: dict[tuple[Status, str], str] = {}

    def of(self, id_: str, status: Status, kind: str, at: str) -> str:
        """The record of a job."""
        if (status, kind) not in self._templates:
            self._templates[status, kind] = _record(status, kind)
        return self._templates[status, kind].replace("JOB_ID", id_).replace("1970-01-01T00:00:00+00:00", at)


def _record(status: Status, kind: str) -> str:
    then = datetime(1970, 1, 1, tzinfo=UTC)
    artifacts = tuple(
        Artifact(f"compressed-tensors/{name}", 1000, "0" * 64, "application/octet-stream", f"JOB_ID/{name}")
        for name in ("model.safetensors", "config.json")
    )
    result: dict[str, Any] = {"compression_ratio": 6.9, "bits_per_weight": 4.25, "warnings": [], "outputs": [{"a": 1}]}
    job = Job("JOB_ID", _request(0), {"bit_width": 4, "group_size": 128}, Status.QUEUED, then)
    if status is not Status.QUEUED:
        job = replace(job, status=status, started_at=then)
    if status.is_terminal:
        job = replace(job, finished_at=then)
    if status is Status.SUCCEEDED:
        job = replace(job, result=result, artifacts=artifacts)
    if kind == "quantize":
        return to_record(job)
    source = {"type": "uri", "uri": "file:///models/minilm"}
    request = ValidateRequest.model_validate({"kind": "validate", "original": source, "quantized": source})
    return to_record(replace(job, request=request))


def _request(number: int) -> QuantizeRequest:
    return QuantizeRequest.model_validate(
        {
            "kind": "quantize",
            "source": {"type": "uri", "uri": "file:///models/minilm"},
            "outputs": [{"format": "compressed-tensors"}],
            "labels": {"team": "abc"[number % 3], "stage": "test"},
        }
    )


def _facts(index: int, count: int) -> tuple[Status, str, str]:
    """Status, kind and tenant of a job."""
    draw = index * 2654435761 % (1 << 32)  # Knuth's multiplicative hash: spread, and the same each time
    share = (draw >> 16) % 1000
    status = Status.SUCCEEDED if share < 900 else Status.FAILED if share < 999 else Status.CANCELLED
    if index >= count - OPEN:
        status = Status.RUNNING if index % 10 == 0 else Status.QUEUED
    kind = "validate" if index % 1000 == 7 else "quantize"
    return status, kind, DEFAULT_TENANT if index % 2 else f"t{(draw >> 8) % 9 + 1}"


def _row(records: _Records, index: int, count: int) -> tuple[Any, ...]:
    status, kind, tenant = _facts(index, count)
    id_ = job_id(index, count)
    at = (END - timedelta(milliseconds=STEP_MS * (count - index))).isoformat(timespec="microseconds")
    in_batch = index % 10 == 0 and index // 10 // BATCH < count // 10 // BATCH
    batch = batch_id(index // 10 // BATCH) if in_batch else None
    stored = 2000 if status is Status.SUCCEEDED else 0
    ended = at if status.is_terminal else None
    return id_, tenant, kind, status, at, records.of(id_, status, kind, at), batch, stored, ended


def _labels(count: int) -> Iterator[tuple[str, ...]]:
    every = max(1, count // RARE)
    for index in range(count):
        status, kind, tenant = _facts(index, count)
        id_ = job_id(index, count)
        yield "team", "abc"[index % 3], id_, tenant, kind, status
        if index % every == 0:
            yield "run", "rare", id_, tenant, kind, status


def _events(count: int) -> Iterator[tuple[str, int, str, str, str]]:
    data = json.dumps({"output": "compressed-tensors", "name": "layer.0.weight", "shape": [768, 768], "bits": 4.25})
    for index in range(0, count, LOGGED):
        for number in range(1, EVENTS + 1):
            type_ = "job.succeeded" if number == EVENTS else "tensor.completed"
            yield job_id(index, count), number, type_, END.isoformat(), data


def _ask_all(data_dir: Path, size: int, repeats: int) -> dict[str, Samples]:
    store = Store(data_dir)
    try:
        found = {}
        for name, ask in QUESTIONS.items():
            some = Sample(size)
            ask(store, some)
            gc.collect()
            found[name] = Samples(tuple(seconds(lambda ask=ask, some=some: ask(store, some)) for _ in range(repeats)))
        return found
    finally:
        store.close()


def _batch(store: Store, id_: str) -> object:
    with store.reading() as db:
        return batch_table.get(db, id_)


def _submit(store: Store, job: Job) -> None:
    store.add(job, [Event(1, "job.queued", job.id, job.created_at, {"status": "queued", "queue_position": 0})])


def _submit_and_end(store: Store, job: Job) -> None:
    _submit(store, job)
    running = job.to(Status.RUNNING)
    store.write([running], [Event(2, "job.started", job.id, job.created_at, {"status": "running"})])
    ended = running.to(Status.SUCCEEDED)
    store.write([ended], [Event(3, "job.succeeded", job.id, job.created_at, {"status": "succeeded"})])


def _look(store: Store) -> None:
    before = (END - timedelta(days=1000)).isoformat()
    with store.reading() as db:
        for look in (retention_table.old_jobs, retention_table.old_artifacts, retention_table.old_logs):
            look(db, before, retention_table.START, 200)
        retention_table.total_bytes(db)


def _expire(store: Store, id_: str) -> None:
    with store.transaction() as db:
        retention_table.expire_artifacts(db, id_, END)


def _trim(store: Store, id_: str) -> None:
    with store.transaction() as db:
        retention_table.trim_log(db, id_, END, 200)


def _erase(store: Store, id_: str) -> None:
    with store.transaction() as db:
        retention_table.erase(db, id_, END, 200)


# --- a start ---


def _start(data_dir: Path) -> list[str]:
    """Seconds, MiB, and seconds of the look for orphans, in a process of its own."""
    program = "import sys; from bench.store import start; start(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, str(data_dir)], check=True, capture_output=True, text=True)
    took, grown, looked = map(float, done.stdout.split())
    return [f"{took:.3f}", f"{grown / MIB:.1f}", f"{looked:.2f}"]


def start(data_dir: str) -> None:
    """Open a data folder as a server does; prints the seconds, the bytes, and the seconds of what goes on behind."""
    import os

    from service.jobs.publisher import Publisher
    from service.jobs.recovery import open_batches, recover

    before, begun = anonymous_bytes(os.getpid()), time.perf_counter()
    folders = Folders(Path(data_dir))
    store = Store(Path(data_dir))
    leftovers = recover(store, folders, Publisher(folders, [], Stores(StoreOptions())))
    open_batches(store, leftovers)
    print(time.perf_counter() - begun, anonymous_bytes(os.getpid()) - before)
    begun = time.perf_counter()
    with ThreadPoolExecutor(1) as thread:
        blobs = Blobs(Path(data_dir) / "blobs", lambda: store, BlobLimits())
        asyncio.run(remove_orphans(Database(lambda: store, thread), folders, Leases(), blobs))
    print(time.perf_counter() - begun)
    store.close()


# --- sweeps ---


def _sweep(data_dir: Path, size: int) -> list[str]:
    return asyncio.run(_sweep_beside_reads(data_dir, size))


async def _sweep_beside_reads(data_dir: Path, size: int) -> list[str]:
    store = Store(data_dir)
    some, taken = Sample(size), list[float]()
    with ThreadPoolExecutor(1) as thread:
        database, leases = Database(lambda: store, thread), Leases()
        blobs = Blobs(data_dir / "blobs", lambda: store, BlobLimits())
        await asyncio.to_thread(blobs.create)
        removals = Removals(database, Folders(data_dir), leases, asyncio.ensure_future)
        collector = Collector(database, leases, removals, blobs, lambda: ())

        async def ask() -> None:
            while True:
                begun = time.perf_counter()
                await database.run(lambda store: store.get(some.job_id()))
                taken.append(time.perf_counter() - begun)
                await asyncio.sleep(0.001)

        begun = time.perf_counter()
        await collector.sweep(Rules(job_ttl_s=0.0), END, dry_run=True)
        shown_s = time.perf_counter() - begun
        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)
        begun = time.perf_counter()
        oldest_s = STEP_MS / 1000 * size * 0.99
        swept = await collector.sweep(Rules(job_ttl_s=oldest_s), END)
        deleted_s = time.perf_counter() - begun
        asking.cancel()
        await asyncio.wait([asking])
    store.close()
    reads = Samples(tuple(taken))
    times = (reads.median, reads.percentile(99), reads.worst)
    return [f"{shown_s:.2f}", f"{swept.count:,}", f"{deleted_s:.2f}", *(f"{s * 1e3:.2f}" for s in times)]


if __name__ == "__main__":
    main()
