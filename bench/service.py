"""The service over HTTP while it computes: how soon it answers, tells and stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.common import GB, MIB, Samples, note, table, write_result
from bench.models import Model, equal, layered, scratch, with_giant, write_model
from bench.resident import anonymous_bytes
from bench.server import Client, Server, started

SUBMITS = 200
CANCELS = 20
LARGE_BYTES = 1_000_000_000
#: Narrow, so that the large model has over a thousand tensors to tell of.
NARROW = 512
METHODS = ("minmax", "mse")
PACKAGES = ("uvicorn", "fastapi", "httpx", "numpy", "numba", "pyarrow")
#: What /readyz tells of stalls is of the last minute.
STALL_WINDOW_S = 60.0
SETTLE_S = 0.3

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
- *stall*: by how much the server's event loop was late at worst, as it measures by itself.
"""


def main(large_bytes: int = LARGE_BYTES, submits: int = SUBMITS, cancels: int = CANCELS) -> None:
    """Measure, print and write the table."""
    with scratch(4 * large_bytes) as folder:
        note(f"writing models of {large_bytes / GB:.1f} GB")
        models = folder / "models"
        models.mkdir()
        tiny = write_model(models / "tiny.safetensors", equal(4, (64, 128)), "F32")
        large = write_model(models / "large.safetensors", layered(large_bytes, "BF16", width=NARROW), "BF16")
        giant = write_model(models / "giant.safetensors", with_giant(large_bytes, large_bytes, "BF16"), "BF16")
        with started(folder, models) as server:
            asyncio.run(_measure(server, tiny, large, giant, submits, cancels))


async def _measure(server: Server, tiny: Model, large: Model, giant: Model, submits: int, cancels: int) -> None:
    async with Client(server) as client:
        await _warm_up(client, tiny.path)
        warm_at = time.monotonic()
        rows, kept = [], []
        for method in METHODS:
            note(f"cancelling inside one large tensor, {method}")
            taken, left = await _cancels(client, server, giant.path, method, cancels)
            rows.append(_row(f"cancel, {method}", taken))
            kept.append(f"{left / MIB:+.0f} MiB after {cancels} cancelled jobs with {method}")
        note("submitting while nothing runs")
        rows.append(_row("submit, idle", await _submits(client, tiny.path, submits)))
        # The stalls of starting and compiling are not what is asked for.
        await asyncio.sleep(max(0.0, STALL_WINDOW_S - (time.monotonic() - warm_at)))
        note("submitting while a large job runs")
        rows.append(_row("submit, busy", await _while_busy(client, large.path, _submits(client, tiny.path, submits))))
        stalls = [await client.longest_stall_s()]
        note("following a large job")
        rows.append(_row(f"event, {large.tensors} tensors", await _event_delays(client, large.path)))
        stalls.append(await client.longest_stall_s())
    found = (
        f"Longest stall of the server's event loop while large jobs ran: {max(stalls) * 1e3:.1f} ms.\n\n"
        f"Memory of the server (RssAnon) against before: {'; '.join(kept)}."
    )
    head = ("ms", "n", "p50", "p90", "p99", "worst")
    about = ABOUT.format(giant=giant.nbytes / GB)
    write_result("service", "The service while it computes", about, table(head, rows), found, packages=PACKAGES)


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


async def _event_delays(client: Client, source: Path) -> Samples:
    job_id = await client.submit(source)
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
