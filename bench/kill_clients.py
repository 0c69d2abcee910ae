"""What clients do while their server is killed again and again, and what they were told."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from bench.retrying import Calls, Json, Retrying, Stopped

#: A search for each group, and nothing but the specification to compute it with: slow enough to be cancelled.
SLOW = {"backend": "reference", "method": "mse"}
PACE_S = 0.03
#: Of all that succeed so many are purged; the others stay to be looked at in the end.
PURGED = 0.7
#: And a number, which the model's outputs hold the hash of.
FROM_BLOBS = "from blobs "


@dataclass(frozen=True, slots=True)
class Place:
    """Where models lie and targets may be written; `elsewhere` is on another file system, if there is one."""

    model: Path
    slice: Path
    targets: Path
    elsewhere: Path


@dataclass(slots=True)
class Promises:
    """What the server has said to any client. Each field is only added to."""

    #: Every job that was accepted, and what it does.
    accepted: dict[str, str] = field(default_factory=dict)
    purged: set[str] = field(default_factory=set)
    #: Whose cancelling was confirmed.
    cancelled: set[str] = field(default_factory=set)
    #: Ids and types of events that were shown.
    shown: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    #: Results by what was done; each job adds one, all of which have to be the same.
    results: dict[str, list[tuple[str, dict[str, str]]]] = field(default_factory=dict)
    #: Where jobs write that may have been cancelled.
    targets: dict[str, Path] = field(default_factory=dict)


class Session:
    """One client: one piece of work after the other, each checked when it is done."""

    def __init__(
        self, client: Retrying, place: Place, promises: Promises, rng: random.Random, *, disturbing: bool = True
    ) -> None:
        """`disturbing` ones also cancel and purge."""
        self._client = client
        self._place = place
        self._promises = promises
        self._rng = rng
        self._disturbing = disturbing

    def again(self, promises: Promises) -> None:
        """All that has given a result, once."""
        for work in self.works():
            if work != self.from_blobs:
                work()
        for name in promises.results:
            if name.startswith(FROM_BLOBS):
                self.from_blobs(int(name.removeprefix(FROM_BLOBS)))

    def works(self) -> list[Callable[[], None]]:
        """All that a client does, one kind after the other."""
        kinds = [self.both_formats, self.several_outputs, self.to_addresses, self.chain, self.batch, self.from_blobs]
        return [*kinds, *([self.cancelled, self.cancelled] if self._disturbing else [])]

    def both_formats(self) -> None:
        """Real weights into both formats, by searching."""
        self._run("both formats", quantize(self._place.model, "compressed-tensors", "parquet"))

    def several_outputs(self) -> None:
        """Three outputs of one read."""
        outputs = [
            {"format": "parquet", "name": "p3", "config": {"bit_width": 3}},
            {"format": "parquet", "name": "p8", "config": {"bit_width": 8}},
            {"format": "compressed-tensors", "name": "c4"},
        ]
        self._run("several outputs", quantize(self._place.slice, *outputs, method="minmax"))

    def to_addresses(self) -> None:
        """An output beside the data folder and one on another file system, and one that stays."""
        name = f"{self._rng.getrandbits(64):016x}"
        near, far = self._place.targets / name, self._place.elsewhere / name
        outputs = [
            {"format": "parquet", "name": "near", "uri": near.as_uri()},
            {"format": "compressed-tensors", "name": "far", "uri": far.as_uri()},
            {"format": "parquet", "name": "kept"},
        ]
        self._run("to addresses", quantize(self._place.slice, *outputs, method="minmax"))

    def chain(self) -> None:
        """A copy, a job that reads it, and one that compares that with the original."""
        copied = self._run("copy", quantize(self._place.slice, "compressed-tensors", skip=["*"]), keep=True)
        source = {"type": "job", "job_id": copied}
        quantized = self._run("from a job", quantize(source, "parquet"), keep=True)
        compared = {"type": "job", "job_id": quantized}
        self._run("validate", {"kind": "validate", "original": source, "quantized": compared})
        for job_id in (copied, quantized):
            self._perhaps_purge(job_id)

    def batch(self) -> None:
        """Three jobs in one call."""
        widths = (2, 4, 6)
        items = [quantize(self._place.slice, "parquet", bit_width=width, method="minmax") for width in widths]
        answer = self._client.create("/v1/batches", {"items": items})
        names = [f"batch, {width} bits" for width in widths]
        for job_id, name in zip(answer["job_ids"], names, strict=True):
            self._promises.accepted[job_id] = name
        for job_id, name in zip(answer["job_ids"], names, strict=True):
            self._finish(name, job_id)
            self._perhaps_purge(job_id)

    def from_blobs(self, number: int | None = None) -> None:
        """A model that nobody has sent yet, or the one of this number, and a job on it."""
        number = self._rng.getrandbits(32) if number is None else number
        data = renamed(self._place.slice, number)
        digest = hashlib.sha256(data).hexdigest()
        self._client.upload(digest, data, PACE_S if self._disturbing else 0.0)
        source = {"type": "blobs", "files": {"model.safetensors": f"sha256:{digest}"}}
        self._run(f"{FROM_BLOBS}{number}", quantize(source, "parquet"))

    def cancelled(self) -> None:
        """A job that is cancelled somewhere on its way, and may be purged; a quick one while it closes or publishes."""
        root = self._rng.choice((self._place.targets, self._place.elsewhere))
        target = root / f"c-{self._rng.getrandbits(64):016x}"
        outputs = ["compressed-tensors", {"format": "parquet", "uri": target.as_uri()}]
        pace: Json = self._rng.choice((SLOW, {"method": "minmax"}))
        job_id = self._submit("cancelled", quantize(self._place.slice, *outputs, **pace))
        self._promises.targets[job_id] = target
        time.sleep(self._rng.uniform(0, 0.4))
        if self._client.cancel(job_id) in ("cancelling", "cancelled"):
            self._promises.cancelled.add(job_id)
        self._promises.shown[job_id] = self._client.follow(job_id)
        self._perhaps_purge(job_id)

    # --- steps ---

    def _run(self, name: str, body: Json, *, keep: bool = False) -> str:
        job_id = self._submit(name, body)
        self._finish(name, job_id)
        if not keep:
            self._perhaps_purge(job_id)
        return job_id

    def _submit(self, name: str, body: Json) -> str:
        job_id = str(self._client.create("/v1/jobs", body)["id"])
        self._promises.accepted[job_id] = name
        return job_id

    def _finish(self, name: str, job_id: str) -> None:
        self._promises.shown[job_id] = self._client.follow(job_id)
        job = self._client.job(job_id)
        assert job["status"] == "succeeded", f"{name}: {job}"
        files = self._fetched(job_id)
        if job["kind"] == "validate":
            files = {"report": self._compared(job_id)}
        self._promises.results.setdefault(name, []).append((job_id, files))

    def _fetched(self, job_id: str) -> dict[str, str]:
        """SHA-256 of each file as it came, which has to be what was announced."""
        announced = self._client.files(job_id)
        for path, digest in announced.items():
            file = self._client.call("GET", "GET", f"/v1/jobs/{job_id}/artifacts/{path}", accepted={200}).content
            assert hashlib.sha256(file).hexdigest() == digest, f"{job_id}: {path} is not what was announced"
        return announced

    def _compared(self, job_id: str) -> str:
        report = self._client.call("GET", "GET", f"/v1/jobs/{job_id}/report", accepted={200}).json()
        return json.dumps(_timeless(report["outputs"]), sort_keys=True)

    def _perhaps_purge(self, job_id: str) -> None:
        if self._disturbing and self._rng.random() < PURGED:
            self._promises.purged.add(job_id)
            self._client.purge(job_id)


class Clients:
    """Several sessions at once, each in a thread, until they are told to finish."""

    def __init__(self, count: int, where: Callable[[], str], place: Place, seed: int) -> None:
        self.calls = Calls()
        self.promises = Promises()
        self._over, self._stop = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="client")
        self._begin = [
            partial(self._live, Retrying(where, self.calls, self._stop), place, random.Random(f"{seed}/{number}"))
            for number in range(count)
        ]
        self._lives: list[Future[None]] = []

    def start(self) -> None:
        """Begin."""
        self._lives = [self._pool.submit(begin) for begin in self._begin]

    def finish(self, timeout_s: float) -> None:
        """Let each end what it is at; raises what went wrong in any."""
        self._over.set()
        wait(self._lives, timeout_s, FIRST_EXCEPTION)
        self.check()
        assert all(life.done() for life in self._lives), f"what clients wait for has not come after {timeout_s:.0f} s"

    def stop(self) -> None:
        """End all, also where nobody answers."""
        self._over.set()
        self._stop.set()
        self._pool.shutdown()

    def check(self) -> None:
        """Raise what went wrong in any of them."""
        for life in self._lives:
            if life.done():
                life.result()

    def _live(self, client: Retrying, place: Place, rng: random.Random) -> None:
        works = Session(client, place, self.promises, rng).works()
        with closing(client), suppress(Stopped):
            while not self._over.is_set():
                rng.choice(works)()


def quantize(source: Path | Json, *outputs: str | Json, **config: Any) -> Json:
    """The body of a job that quantizes."""
    where = {"type": "uri", "uri": source.as_uri()} if isinstance(source, Path) else source
    asked = [{"format": output} if isinstance(output, str) else output for output in outputs]
    # What a job of real weights loses does not matter here.
    return {"kind": "quantize", "source": where, "outputs": asked, "config": {"min_accuracy": 0.0} | config}


def write_slice(model: Path, folder: Path, layers: int = 1) -> Path:
    """A model folder with the first layers of a real one and without its embeddings."""
    wanted = tuple(f"encoder.layer.{index}." for index in range(layers))
    with safe_open(model / "model.safetensors", "np") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys() if name.startswith(wanted)}  # noqa: SIM118
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(save({n: np.ascontiguousarray(t) for n, t in tensors.items()}))
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


def renamed(folder: Path, number: int) -> bytes:
    """The weights of a folder as a file that is like no other: its header holds a number."""
    with safe_open(folder / "model.safetensors", "np") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return save(tensors, {"number": f"{number:08x}"})


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(part) for name, part in value.items() if not name.endswith(("seconds", "_s"))}
    return [_timeless(part) for part in value] if isinstance(value, list) else value
