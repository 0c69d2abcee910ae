"""A disk that is full at one write of a job after the other: what the job says, and what becomes of the service."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from safetensors.numpy import save_file

from bench.common import below, note, table, write_result
from bench.models import scratch
from bench.small_disk import PAGE, SmallDisk, may_mount, mounting
from tests.server import TERMINAL, Json, Server, body, validation

DISK_BYTES = 32 << 20
#: A job that does not end by then is held up by a full disk, and has to end when there is room.
HELD_S = 2.0
UPLOAD_BYTES = 300_000
BATCH = 4
PACKAGES = ("uvicorn", "fastapi", "numpy", "numba", "pyarrow")

ABOUT = f"""
The data folder and a folder that outputs are written to lie each on a tmpfs of {DISK_BYTES >> 20} MiB, mounted for the
server alone. All but some pages of one of them is filled, a call is made, and so on with one page ({PAGE} bytes) more,
until three calls in a row have succeeded: so the disk is full at every write, one after the other. Each time: the call
is answered 507, or the job fails with `disk_full`; `/healthz`, the list and the job's event stream go on answering;
the stream ends with the job's end, and then nothing of the job is left in any folder; with the room back, the same call
succeeds and gives the same files, and an upload goes on where it was cut. *held*: the database itself could not be
written, so the job's end was told when there was room again.
"""


@dataclass(frozen=True, slots=True)
class Met:
    """What one attempt with so much room came to."""

    room_bytes: int
    #: `accepted` never says no: a call was refused, a job failed, or all went well.
    outcome: str
    detail: str
    held: bool = False


@dataclass(slots=True)
class Attempt:
    """What may fail: a call, and how to undo and to judge it."""

    name: str
    disk: SmallDisk
    call: Callable[[], Met]
    #: Of the same call with room: raises AssertionError unless it gives what it should.
    again: Callable[[], None]
    mets: list[Met] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Place:
    """The two disks, the models, and a server that sees them."""

    server: Server
    data: SmallDisk
    target: SmallDisk
    model: Path
    other: Path


def main() -> None:
    """Fill, call, check, print and write the table."""
    if not may_mount():
        raise SystemExit("bench: this needs a mount namespace (unshare --map-root-user --mount) to make small disks in")
    rows: list[Sequence[object]] = []
    with scratch(1e9) as folder:
        for name in ATTEMPTS:
            with placed(folder / name.replace(" ", "-").replace(",", "")) as place:
                mets = step_through(place, name, every_page())
                rows += summary(name, mets)
                note(f"{name}: {len(mets)} rooms")
    head = ("what is done", "rooms, KiB", "answered", "it says: no space left while", "times", "held")
    write_result("disk_full", "A full disk at every write", ABOUT, table(head, rows), packages=PACKAGES)


def every_page() -> Iterator[int]:
    """Bytes of room, one page more each time."""
    yield from range(0, DISK_BYTES, PAGE)


def step_through(place: Place, name: str, rooms: Iterable[int], enough: int = 3) -> list[Met]:
    """What came of each room, up to `enough` successes in a row; raises AssertionError when a promise is broken."""
    attempt = ATTEMPTS[name](place)
    attempt.again()
    successes = 0
    for room in rooms:
        met = _with_room(place, attempt, room)
        attempt.mets.append(met)
        successes = successes + 1 if met.outcome == "succeeded" else 0
        if successes == enough:
            break
    return attempt.mets


def _with_room(place: Place, attempt: Attempt, room: int) -> Met:
    attempt.disk.leave(room)
    try:
        met = attempt.call()
        _check_alive(place.server)
    finally:
        attempt.disk.free()
    _check_clean(place)
    if met.outcome != "succeeded":
        attempt.again()
    return met


def _check_alive(server: Server) -> None:
    assert server.client.get("/healthz").status_code == 200
    assert server.client.get("/v1/jobs").status_code == 200


def _check_clean(place: Place) -> None:
    """The disks hold succeeded jobs' artifacts, complete blobs and nothing else but the database."""
    data = place.data.seen / "data"
    left = [path for folder in ("artifacts", "blobs/parts") for path in (data / folder).glob("*/*")]
    left += [*(data / "work").iterdir(), *place.target.seen.iterdir()]
    assert not left, left


# --- what is done ---


def _quantizing(place: Place) -> Attempt:
    asked = body(place.model, "compressed-tensors", "parquet", backend="cpu", min_accuracy=0.0)
    return _job("quantize into both formats", place, place.data, asked)


def _elsewhere(place: Place) -> Attempt:
    target = {"format": "parquet", "uri": (place.target.path / "out").as_uri()}
    asked = body(place.model, target, backend="cpu", min_accuracy=0.0)
    return _job("publish to another disk", place, place.target, asked)


def _validating(place: Place) -> Attempt:
    return _job("validate", place, place.data, validation(place.model, place.other))


def _batching(place: Place) -> Attempt:
    asked = {"items": [body(place.model, "parquet", backend="cpu", min_accuracy=0.0) for _ in range(BATCH)]}

    def call() -> Met:
        room = _room(place.data)
        response = place.server.client.post("/v1/batches", json=asked)
        if response.status_code != 202:
            return Met(room, *_refused(response))
        return _ended(place, room, response.json()["job_ids"])

    def again() -> None:
        met = call()
        assert met.outcome == "succeeded", met

    return Attempt("a batch of jobs", place.data, call, again)


def _uploading(place: Place) -> Attempt:
    rng = np.random.default_rng(0)

    def call() -> Met:
        room, data = _room(place.data), rng.bytes(UPLOAD_BYTES)
        address = f"/v1/blobs/sha256:{hashlib.sha256(data).hexdigest()}"
        response = place.server.client.put(address, content=data)
        if response.status_code == 201:
            return Met(room, "succeeded", "")
        met = Met(room, *_refused(response))
        place.data.free()
        head = place.server.client.head(address)
        offset = int(head.headers["upload-offset"])
        rest = {"Content-Range": f"bytes {offset}-{len(data) - 1}/{len(data)}"}
        if offset == len(data):
            rest = {"Content-Range": f"bytes */{len(data)}"}
        response = place.server.client.put(address, content=data[offset:], headers=rest)
        assert response.status_code == 201, f"{offset} of {len(data)}: {response.text}"
        return met

    return Attempt("upload a blob", place.data, call, lambda: None)


#: By name: what is done on a disk without room.
ATTEMPTS: dict[str, Callable[[Place], Attempt]] = {
    "quantize into both formats": _quantizing,
    "publish to another disk": _elsewhere,
    "validate": _validating,
    "a batch of jobs": _batching,
    "upload a blob": _uploading,
}


def _job(name: str, place: Place, disk: SmallDisk, asked: Json) -> Attempt:
    expected: dict[str, str] = {}

    def call() -> Met:
        room = _room(disk)
        response = place.server.client.post("/v1/jobs", json=asked)
        if response.status_code != 202:
            return Met(room, *_refused(response))
        return _ended(place, room, [response.json()["id"]])

    def again() -> None:
        job = place.server.run(asked)
        files = {entry["path"]: entry["sha256"] for entry in place.server.artifacts(job["id"])}
        assert place.server.files(job["id"]).keys() == files.keys()
        assert files == (expected or files), "the files are others than before"
        expected.update(files)
        _remove(place, job["id"])

    return Attempt(name, disk, call, again)


def _ended(place: Place, room: int, job_ids: Sequence[str]) -> Met:
    """What became of jobs, which are purged then; a disk that holds up their end is given room."""
    server = place.server
    deadline = time.monotonic() + HELD_S
    held = False
    jobs = []
    for job_id in job_ids:
        while (job := server.job(job_id, wait_s=1))["status"] not in TERMINAL:
            if time.monotonic() > deadline:
                held = True
                place.data.free()
                deadline = time.monotonic() + 60
            _check_alive(server)
        assert server.follow(job_id)[-1]["type"] == f"job.{job['status']}"
        left = [] if job["status"] == "succeeded" else [p for p in below(place.data.seen) if job_id in p.parts]
        assert not left, left
        jobs.append(job)
    place.data.free()
    for job in jobs:
        _remove(place, job["id"])
    failures = [job["error"] for job in jobs if job["status"] == "failed"]
    assert all(failure["code"] == "disk_full" for failure in failures), failures
    return Met(room, "job failed", _doing(failures[0]), held) if failures else Met(room, "succeeded", "", held)


def _remove(place: Place, job_id: str) -> None:
    response = place.server.client.delete(f"/v1/jobs/{job_id}", params={"purge": "true"})
    assert response.status_code == 204, response.text
    for path in place.target.seen.glob("out/**/*"):
        if path.is_file():
            path.unlink()
    for path in sorted(place.target.seen.glob("out/**/"), reverse=True):
        path.rmdir()


def _refused(response: httpx.Response) -> tuple[str, str]:
    problem = response.json()
    assert (response.status_code, problem["code"]) == (507, "disk_full"), response.text
    return "507", _doing(problem)


def _doing(problem: Json) -> str:
    return str(problem["detail"]).removeprefix("there was no space left while ").partition(":")[0]


def _room(disk: SmallDisk) -> int:
    return DISK_BYTES - disk.used_bytes - _ballast(disk)


def _ballast(disk: SmallDisk) -> int:
    path = disk.seen / "ballast"
    return path.stat().st_size if path.exists() else 0


def summary(name: str, mets: Sequence[Met]) -> list[Sequence[object]]:
    """A row for each thing that was said, with the rooms that led to it."""
    rows: list[Sequence[object]] = []
    for key in dict.fromkeys((met.outcome, met.detail) for met in mets):
        same = [met for met in mets if (met.outcome, met.detail) == key]
        rooms = f"{same[0].room_bytes >> 10} to {same[-1].room_bytes >> 10}"
        rows.append((name, rooms, *key, len(same), sum(met.held for met in same)))
    return rows


@contextmanager
def placed(folder: Path) -> Iterator[Place]:
    """A server on two small disks, which ends with the block and has left no crash in its log."""
    models, data, target = folder / "models", SmallDisk(folder / "disk"), SmallDisk(folder / "target")
    for path in (models, data.path, target.path):
        path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {f"layers.{n}.weight": rng.standard_normal((64, 512), np.float32) for n in range(6)}
    save_file(tensors, models / "model.safetensors")
    save_file({name: tensor.round(1) for name, tensor in tensors.items()}, models / "other.safetensors")
    server = Server(
        data.path / "data",
        [models, target.path],
        log_path=folder / "server.log",
        prefix=mounting(data, target, size_bytes=DISK_BYTES),
    ).start()
    try:
        data.of(server.pid)
        target.of(server.pid)
        yield Place(server, data, target, models / "model.safetensors", models / "other.safetensors")
        server.stop()
        assert "Traceback" not in server.log, server.log_end
    finally:
        if server.is_running:
            server.kill()


if __name__ == "__main__":
    main()
