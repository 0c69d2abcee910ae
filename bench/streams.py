"""A thousand readers of the events of fifty running jobs: who hears what, how late, and what that takes."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.charts import Bar, Chart
from bench.common import MIB, Samples, note, table, write_result
from bench.models import Model, equal, scratch, write_model
from tests.server import Json, Server, body

STREAMS, JOBS = 1000, 50
DEAF, RESETS = 100, 100
SHAPE = (768, 768)
TENSORS = 75
#: Sockets of both ends, and what else is open.
FILES_MORE = 512
SETTLE_S = 2.0
PACKAGES = ("uvicorn", "fastapi", "numpy", "numba", "pyarrow")

ABOUT = """
{jobs} jobs run at once ({lanes}), each over {tensors} tensors of {shape} ({model:.0f} MB), and {streams} streams read
their events, as many on each, in a process of their own on the same cores. Every stream has to hear every event of the
log but progress, once and in order. *lag* is from the `at` of such an event, which is stored in between, to the moment
the reader holds it; what was read back when a stream began does not count. *with bad readers*: {deaf} more
connections never read a byte, {resets} more are reset in the middle of a stream
after 2 to 7 seconds and come again, over and over.
"""


@dataclass(frozen=True, slots=True)
class Case:
    """Who listens."""

    name: str
    streams: int
    deaf: int = 0
    resets: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """What one case took, and what its readers heard."""

    case: Case
    seconds: float
    server_cpu_s: float
    client_cpu_s: float
    lags_ms: Samples
    deliveries: int
    stall_ms: float
    peak_bytes: int

    def cells(self) -> list[str]:
        """As the table shows it."""
        lags = [f"{self.lags_ms.median:.1f}", f"{self.lags_ms.percentile(99):.1f}", f"{self.lags_ms.worst:.1f}"]
        return [
            self.case.name,
            f"{self.deliveries:,}",
            *(lags if self.case.streams else ["", "", ""]),
            f"{self.stall_ms:.0f}",
            f"{self.seconds:.1f}",
            f"{self.server_cpu_s:.1f}",
            f"{self.client_cpu_s:.1f}",
            f"{self.peak_bytes / MIB:.0f} MiB",
        ]


def main(streams: int = STREAMS, jobs: int = JOBS) -> None:
    """Measure, print and write the table; ends with an AssertionError when a reader missed something."""
    allow_files(2 * (streams + DEAF + RESETS) + FILES_MORE)
    cases = [Case("none", 0), Case(f"{streams:,}", streams), Case("with bad readers", streams, DEAF, RESETS)]
    with scratch(4e9) as folder:
        (folder / "models").mkdir()
        model = write_model(folder / "models" / "model.safetensors", equal(TENSORS, SHAPE), "F32")
        waiting = idle_bytes(folder, model, streams, jobs)
        measured = [measure(folder, model, case, jobs) for case in cases]
    about = ABOUT.format(
        jobs=jobs, lanes=f"`ARROWQUANT_MAX_RUNNING_JOBS={jobs}`", tensors=TENSORS, shape="x".join(map(str, SHAPE)),
        model=model.nbytes / 1e6, streams=f"{streams:,}", deaf=DEAF, resets=RESETS,
    )  # fmt: skip
    head = (
        "streams",
        "events",
        "lag p50, ms",
        "p99",
        "worst",
        "stall, ms",
        "s",
        "CPU s",
        "of readers",
        "RssAnon, peak",
    )
    rows = table(head, (one.cells() for one in measured))
    found = (
        f"Memory of the server for each stream that waits (RssAnon before and after {streams:,} of them): "
        f"{waiting / 1024:.1f} KiB.\n\n*events* are deliveries, progress included. *stall* is by how much the event "
        "loop was late at worst, as it measures by itself; *CPU s* includes the jobs; the first row is they alone."
    )
    charts = [
        Chart(
            f"{jobs} jobs, {one.case.name} streams: from an event to its reader",
            "ms",
            [
                Bar("median", one.lags_ms.median),
                Bar("99th percentile", one.lags_ms.percentile(99)),
                Bar("worst", one.lags_ms.worst),
            ],
            logarithmic=True,
        )
        for one in measured
        if one.case.streams
    ]
    write_result("streams", "Many readers of many jobs", about, rows, found, packages=PACKAGES, charts=charts)


def allow_files(count: int) -> None:
    """Raise the limit of open files, for the processes started from here as well; ends the run when it may not be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise SystemExit(f"bench: {count} open files are needed, {hard} are allowed (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


def measure(folder: Path, model: Model, case: Case, jobs: int) -> Measured:
    """So many jobs on a fresh server, and their readers; raises AssertionError when one missed something."""
    note(f"{jobs} jobs, {case.streams} streams, {case.deaf + case.resets} bad readers")
    with running(folder / f"data-{case.streams}-{case.deaf}", model.path.parent, jobs) as server:
        server.run(body(model.path, "parquet", bit_width=2, min_accuracy=0.0))
        process = psutil.Process(server.pid)
        before = sum(process.cpu_times()[:2])
        begun = time.monotonic()
        ids = [server.submit(body(model.path, "parquet", bit_width=2, min_accuracy=0.0))["id"] for _ in range(jobs)]
        with listening(server, case, ids) as client:
            peak = _watch(server, ids)
            seconds, cpu = time.monotonic() - begun, sum(process.cpu_times()[:2]) - before
            stall_ms = server.client.get("/readyz").json()["longest_stall_s"] * 1e3
            answer = hear(client)
        check_heard(server, ids, answer["heard"])
        lags = tuple(lag * 1e3 for one in answer["heard"] for lag in one["lags_s"])
        deliveries = sum(len(one["ids"]) + one["progress"] for one in answer["heard"])
        return Measured(case, seconds, cpu, answer["cpu_s"], Samples(lags or (0.0,)), deliveries, stall_ms, peak)


def check_heard(server: Server, job_ids: Sequence[str], heard: Sequence[Json]) -> None:
    """Raise AssertionError unless each reader heard the log of its job: everything but progress, once, in order."""
    logs = {job_id: log_ids(server, job_id) for job_id in job_ids}
    for number, one in enumerate(heard):
        assert one["last"] == "job.succeeded", f"reader {number} of {one['job_id']} ended with {one['last']!r}"
        assert one["ids"] == logs[one["job_id"]], f"reader {number} of {one['job_id']} heard something else"


def log_ids(server: Server, job_id: str) -> list[int]:
    """The ids of all events that are stored."""
    found: list[int] = []
    while True:
        after = found[-1] if found else 0
        page = server.client.get(
            f"/v1/jobs/{job_id}/events", params={"limit": 200, "after": after}, headers={"Accept": "application/json"}
        ).json()
        found += [event["id"] for event in page["data"]]
        if "next_cursor" not in page:
            return found


def idle_bytes(folder: Path, model: Model, streams: int, jobs: int) -> float:
    """Anonymous memory of the server for each of so many streams on jobs that wait behind another."""
    note(f"memory of {streams} streams that wait")
    with running(folder / "data-idle", model.path.parent, 1) as server:
        slow = body(model.path, "parquet", backend="reference", method="mse")
        ids = [server.submit(slow)["id"] for _ in range(jobs + 1)]
        with listening(server, Case("once", jobs), ids[1:]):  # what is loaded or grown at the first use
            time.sleep(SETTLE_S)
        before = _memory(server)
        with listening(server, Case("idle", streams), ids[1:]):
            time.sleep(SETTLE_S)
            after = _memory(server)
        for job_id in reversed(ids):
            server.cancel(job_id)
    return (after - before) / streams


@contextmanager
def running(data: Path, root: Path, jobs: int) -> Iterator[Server]:
    """A server on a fresh folder that runs so many jobs at once; it ends with the block."""
    server = Server(data, [root], max_running_jobs=jobs, block_bytes=1 << 20).start()
    try:
        yield server
        server.stop()
        assert "Traceback" not in server.log, server.log_end
    finally:
        if server.is_running:
            server.kill()


@contextmanager
def listening(server: Server, case: Case, job_ids: Sequence[str]) -> Iterator[subprocess.Popen[str] | None]:
    """The readers' process, when all streams have begun; None for nobody. It goes with the block."""
    if not case.streams:
        yield None
        return
    asked = {
        "port": server.client.base_url.port,
        "job_ids": [job_ids[number % len(job_ids)] for number in range(case.streams)],
        "deaf": case.deaf,
        "resets": case.resets,
    }
    command = [sys.executable, "-m", "bench.streams_client"]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(json.dumps(asked) + "\n")
        client.stdin.flush()
        assert client.stdout.readline() == "open\n", "the readers could not begin"
        yield client
    finally:
        client.kill()
        client.communicate()


def hear(client: subprocess.Popen[str] | None) -> Json:
    """What the readers heard, when all streams have ended, and the processor time it took them."""
    if client is None:
        return {"cpu_s": 0.0, "heard": []}
    assert client.stdout is not None
    answer: Json = json.loads(client.stdout.readline())
    return answer


def _watch(server: Server, job_ids: Sequence[str]) -> int:
    """The largest memory while the jobs run to their end."""
    peak = 0
    for job_id in job_ids:
        while server.job(job_id, wait_s=1)["status"] not in ("succeeded", "failed"):
            peak = max(peak, server.anonymous_bytes())
    return max(peak, server.anonymous_bytes())


def _memory(server: Server) -> float:
    values = []
    for _ in range(10):
        values.append(server.anonymous_bytes())
        time.sleep(0.1)
    return statistics.median(values)


if __name__ == "__main__":
    main()
