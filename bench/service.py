"""The service over HTTP: how soon it answers, tells and stops while it computes, and what it adds to the engine."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.charts import Bar, Chart
from bench.common import GB, MIB, Samples, note, table, write_result
from bench.imports import LIBRARIES, SERVICE, cpu
from bench.models import Model, equal, layered, scratch, with_giant, write_model
from bench.resident import anonymous_bytes
from bench.server import Client, Server, started
from bench.service_costs import SmallJob, TableCall, small_job, table_call, table_row

SUBMITS = 200
CANCELS = 20
LARGE_BYTES = 1_000_000_000
#: Narrow, so that the large model has over a thousand tensors to tell of.
NARROW = 512
METHODS = ("minmax", "mse")
PACKAGES = ("uvicorn", "fastapi", "httpx", "numpy", "numba", "pyarrow")
SETTLE_S = 0.3
#: Large jobs that are followed with each method, and what is asked of the loop in the median one.
RUNS, MOST_STALLED_S = 5, 0.02
SMALL_JOBS, MOST_ADDED_S = 50, 0.015
MOST_IMPORT_S = 0.5
TABLE_CALLS, LEAST_SHARE = 7, 0.5

ABOUT = """
A server as `arrowquant serve` starts it, and a client on the same machine, over HTTP on loopback; both share the cores
with the job. Times are in milliseconds. Jobs quantize to 4 bits in groups of 128, both outputs (compressed-tensors and
parquet), minmax where nothing else is said.

- *submit*: from the start of a POST to its 202, and the job is in the database by then. Nothing else runs (*idle*), or
  a large job does (*busy*).
- *event*: from the `at` of a `tensor.completed` to the moment the client holds it, while a large job runs. The event
  was stored in between.
- *cancel*: from the start of a DELETE to the answer of a waiting GET that the job is cancelled, and its files are
  removed; the job is inside one tensor of {giant:.1f} GB.
- *longest stall*: by how much the server's event loop was late at worst in one job, as it measures by itself, in steps.
"""

SMALL = """
From the start of a POST to the last event of a job of one tensor of 64 x 128, beside the engine alone on the same file
in the process of the benchmark: *added* is the difference of the medians. Both sync what they write. Milliseconds.
"""

TABLES = """
`tensors:quantize` to 4 bits on one Arrow batch of F32. *Kernels* are the backend's calls alone, *table* all that the
service does with the bytes of the body until it has those of the answer, *call* what a client sees over HTTP on
loopback. Two are for comparison, with the same bytes there and as many back: *uvicorn* is a server that only joins the
pieces of the body, *loopback* a bare socket. Pieces of a body are copied once, to where the table is then read, and
codes once, to where Arrow wants them beside each other, and once into the answer.
Milliseconds; the shares are of the kernels' rate.
"""


def main(large_bytes: int = LARGE_BYTES, submits: int = SUBMITS, cancels: int = CANCELS) -> None:
    """Measure, print and write the table."""
    with scratch(4 * large_bytes) as folder:
        note(f"writing models of {large_bytes / GB:.1f} GB")
        models = folder / "models"
        models.mkdir()
        tiny = write_model(models / "tiny.safetensors", equal(4, (64, 128)), "F32")
        one = write_model(models / "one.safetensors", equal(1, (64, 128)), "F32")
        large = write_model(models / "large.safetensors", layered(large_bytes, "BF16", width=NARROW), "BF16")
        giant = write_model(models / "giant.safetensors", with_giant(large_bytes, large_bytes, "BF16"), "BF16")
        with started(folder, models) as server:
            busy = asyncio.run(_busy(server, tiny, large, giant, submits, cancels))
            small = asyncio.run(_small_jobs(server, one, folder / "work"))
            tables = [asyncio.run(table_call(server.url, method, TABLE_CALLS)) for method in METHODS]
    note("importing the service")
    _write(busy, small, tables, giant)


@dataclass(frozen=True, slots=True)
class Busy:
    """Rows of the first table, the longest stall of each run in seconds, and what is left in memory, in words."""

    rows: list[Sequence[str]]
    stalls: Samples
    kept: str


async def _busy(server: Server, tiny: Model, large: Model, giant: Model, submits: int, cancels: int) -> Busy:
    async with Client(server) as client:
        await _warm_up(client, tiny.path)
        rows, kept = [], []
        for method in METHODS:
            note(f"cancelling inside one large tensor, {method}")
            taken, left = await _cancels(client, server, giant.path, method, cancels)
            rows.append(_row(f"cancel, {method}", taken))
            kept.append(f"{left / MIB:+.0f} MiB after {cancels} cancelled jobs with {method}")
        note("submitting while nothing runs")
        rows.append(_row("submit, idle", await _submits(client, tiny.path, submits)))
        note("submitting while a large job runs")
        rows.append(_row("submit, busy", await _while_busy(client, large.path, _submits(client, tiny.path, submits))))
        stalls = []
        for method in METHODS:
            note(f"following large jobs, {method}")
            delays = []
            for _ in range(RUNS):
                before = await client.stalls()
                delays += (await _event_delays(client, large.path, method)).values
                stalls.append(_longest(before, await client.stalls()))
            rows.append(_row(f"event, {large.tensors} tensors, {method}", Samples(tuple(delays))))
    return Busy(rows, Samples(tuple(stalls)), "; ".join(kept))


async def _small_jobs(server: Server, one: Model, work: Path) -> dict[str, SmallJob]:
    async with Client(server) as client:
        kinds = {"compressed-tensors": ("compressed-tensors",), "both": ("compressed-tensors", "parquet")}
        return {name: await small_job(client, one, work, formats, SMALL_JOBS) for name, formats in kinds.items()}


def _longest(before: dict[float, int], after: dict[float, int]) -> float:
    """The bound that no stall between two looks at the buckets exceeded."""
    new = {bound: after[bound] - before[bound] for bound in after}
    return min(bound for bound, count in new.items() if count == new[math.inf])


def _write(busy: Busy, small: dict[str, SmallJob], tables: Sequence[TableCall], giant: Model) -> None:
    small_head = ("output", "n", "service p50", "p99", "engine p50", "added")
    table_head = ("", "kernels", "table", "call", "uvicorn", "loopback", "table, share", "call, share")
    write_result(
        "service",
        "The service while it computes",
        ABOUT.format(giant=giant.nbytes / GB),
        table(("ms", "n", "p50", "p90", "p99", "worst"), busy.rows),
        f"Longest stall of each of {len(busy.stalls.values)} large jobs, no more than (ms): "
        f"{', '.join(f'{s * 1e3:.0f}' for s in busy.stalls.values)}.\n\n"
        f"Memory of the server (RssAnon) against before: {busy.kept}.",
        f"## One small tensor\n{SMALL}",
        table(small_head, [_small_row(name, measured) for name, measured in small.items()]),
        f"## One table\n{TABLES}",
        table(table_head, [table_row(measured) for measured in tables]),
        "## Marks",
        table(("mark", "asked", "found", "", "what limits it"), _marks(busy, small, tables)),
        packages=PACKAGES,
        charts=_charts(busy, tables),
    )


def _charts(busy: Busy, tables: Sequence[TableCall]) -> list[Chart]:
    shares = [
        Bar(f"{what}, {t.method}", t.engine.median / taken.median, mark=LEAST_SHARE)
        for t in tables
        for what, taken in (("table", t.table), ("call", t.call))
    ]
    return [
        Chart("Latency, 99 of 100", "ms", [Bar(row[0], float(row[4])) for row in busy.rows], logarithmic=True),
        Chart("One table", "share of the kernels' rate", shares),
    ]


def _small_row(name: str, measured: SmallJob) -> Sequence[str]:
    service, engine = measured.service, measured.engine
    figures = (service.median, service.percentile(99), engine.median, measured.added)
    return [name, str(len(service.values)), *(f"{s * 1e3:.1f}" for s in figures)]


def _marks(busy: Busy, small: dict[str, SmallJob], tables: Sequence[TableCall]) -> list[Sequence[str]]:
    stall, added = busy.stalls.median, max(measured.added for measured in small.values())
    rows = [
        _mark("longest stall of the loop, median job", f"≤ {MOST_STALLED_S * 1e3:.0f} ms", f"{stall * 1e3:.0f} ms",
              "waiting for a core or for Python's lock, which the jobs take as well", met=stall <= MOST_STALLED_S),
        _mark("service time of a small job", f"≤ {MOST_ADDED_S * 1e3:.0f} ms", f"{added * 1e3:.1f} ms",
              "transactions and file system calls, each synced", met=added <= MOST_ADDED_S),
    ]  # fmt: skip
    imported, libraries = cpu(SERVICE).median, cpu(LIBRARIES).median
    why = f"numpy, ml_dtypes, pyarrow and fastapi alone take {libraries * 1e3:.0f} ms"
    rows.append(
        _mark("importing the service, processor's time", f"≤ {MOST_IMPORT_S * 1e3:.0f} ms", f"{imported * 1e3:.0f} ms",
              why, met=imported <= MOST_IMPORT_S)
    )  # fmt: skip
    for measured in tables:
        for what, taken, why in (
            ("table", measured.table, "the copies that are named above"),
            ("call", measured.call, _floor(measured)),
        ):
            share = measured.engine.median / taken.median
            met = share >= LEAST_SHARE
            rows.append(
                _mark(f"{what}, {measured.method}", f"≥ {LEAST_SHARE} of kernels", f"{share:.2f}", why, met=met)
            )
    return rows


def _floor(measured: TableCall) -> str:
    bare, loopback = measured.bare.median * 1e3, measured.loopback.median * 1e3
    return f"for the bytes alone a uvicorn that does nothing takes {bare:.0f} ms, a bare socket {loopback:.0f} ms"


def _mark(what: str, asked: str, found: str, why: str, *, met: bool) -> Sequence[str]:
    return [what, asked, found, "met" if met else "missed", "" if met else why]


async def _warm_up(client: Client, source: Path) -> None:
    """Once through all that is measured: what is loaded or compiled at its first use does not count."""
    for method in METHODS:
        await client.succeeded(await client.submit(source, method=method))
    await _submits(client, source, 3)


async def _submits(client: Client, source: Path, count: int) -> Samples:
    """Seconds of each POST; the next one comes when its job has ended."""
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        job_id = await client.submit(source)
        taken.append(time.perf_counter() - begun)
        await client.succeeded(job_id)
        await client.purge(job_id)
    return Samples(tuple(taken))


async def _while_busy(client: Client, source: Path, work: Any) -> Any:
    """The result of `work`, during which one large job after another runs."""
    begun = asyncio.Event()
    busy = asyncio.create_task(_keep_busy(client, source, begun))
    await begun.wait()
    result = await work
    busy.cancel()
    await asyncio.wait([busy])
    return result


async def _keep_busy(client: Client, source: Path, begun: asyncio.Event) -> None:
    while True:
        job_id = await client.submit(source, method="mse")  # which computes longest
        try:
            await client.under_way(job_id)
            begun.set()
            await client.ended(job_id)
        finally:
            await client.cancel(job_id)
            await client.ended(job_id)
            await client.purge(job_id)


async def _event_delays(client: Client, source: Path, method: str) -> Samples:
    job_id = await client.submit(source, method=method)
    delays = []
    async for event in client.events(job_id):
        arrived = time.time()
        if event.event == "tensor.completed":
            delays.append(arrived - datetime.fromisoformat(event.json()["at"]).timestamp())
    await client.succeeded(job_id)
    await client.purge(job_id)
    return Samples(tuple(delays))


async def _cancels(client: Client, server: Server, source: Path, method: str, count: int) -> tuple[Samples, int]:
    """Seconds from DELETE to cancelled, and the bytes by which the server has grown."""
    before = anonymous_bytes(server.pid)
    taken = []
    for index in range(count):
        job_id = await client.submit(source, method=method)
        await client.under_way(job_id)
        await asyncio.sleep(index * 0.037 % 0.2)  # anywhere in a block
        begun = time.perf_counter()
        await client.cancel(job_id)
        job = await client.ended(job_id)
        taken.append(time.perf_counter() - begun)
        if job["status"] != "cancelled":
            raise RuntimeError(
                f"job {job_id} was {job['status']} before it could be cancelled: it needs a larger model"
            )
        await client.purge(job_id)
    await asyncio.sleep(SETTLE_S)
    return Samples(tuple(taken)), anonymous_bytes(server.pid) - before


def _row(what: str, samples: Samples) -> Sequence[str]:
    figures = (samples.median, samples.percentile(90), samples.percentile(99), samples.worst)
    return [what, str(len(samples.values)), *(f"{s * 1e3:.1f}" for s in figures)]


if __name__ == "__main__":
    main()
