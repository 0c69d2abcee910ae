"""What the clients of a soak do: all that the API offers, wrongly as well, and nothing is left behind."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
from httpx_sse import connect_sse
from safetensors.numpy import save_file

from bench.kill_clients import SLOW, quantize, renamed, write_slice
from bench.retrying import Json
from service.engine.table_io import read_table, write_table

ARROW = "application/vnd.apache.arrow.stream"
PARQUET = "application/vnd.apache.parquet"
TERMINAL = frozenset({"succeeded", "failed", "cancelled"})


class Customer:
    """One client with its connections; every method is a piece of work that cleans up behind itself."""

    def __init__(self, url: str, models: Path, rng: random.Random) -> None:
        """`models` holds `good` and `sick`, see `write_models`."""
        self._http = httpx.Client(base_url=url, timeout=60.0)
        self._good, self._sick = models / "good", models / "sick"
        self._rng = rng

    def close(self) -> None:
        """Hang up."""
        self._http.close()

    def works(self) -> dict[str, Callable[[], None]]:
        """By name."""
        return {
            "jobs followed, fetched whole and in ranges": self.quantize_and_fetch,
            "jobs on another's output, and their comparison": self.chain,
            "jobs cancelled": self.cancel,
            "jobs that fail": self.fail,
            "batches, one item failing, half of them cancelled": self.batch,
            "uploads cut and taken up, and jobs on them": self.upload,
            "streams hung up on": self.hang_up,
            "bad requests": self.mistake,
            "plans": self.plan,
            "tables quantized, dequantized and compared": self.tables,
            "lists and what the server can do": self.browse,
        }

    def quantize_and_fetch(self) -> None:
        """A job sent twice under one key, all its events, its files, report and archive."""
        key = {"Idempotency-Key": uuid.uuid4().hex}
        body = quantize(self._good, "compressed-tensors", "parquet", bit_width=self._rng.choice((2, 3, 4, 8)))
        job_id = self._create("/v1/jobs", body, key)["id"]
        assert self._create("/v1/jobs", body, key)["id"] == job_id
        types = self._follow(job_id)
        assert types["job.succeeded"] == 1, types
        files = self._answer(200, "GET", f"/v1/jobs/{job_id}/artifacts", params={"limit": 200}).json()["data"]
        for entry in files:
            self._fetch_in_ranges(f"/v1/jobs/{job_id}/artifacts/{entry['path']}", entry)
        archive = self._answer(200, "GET", f"/v1/jobs/{job_id}/archive").content
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            assert len(tar.getnames()) == len(files)
        self._answer(200, "GET", f"/v1/jobs/{job_id}/report")
        self._answer(200, "GET", f"/v1/jobs/{job_id}/report?output=parquet", headers={"Accept": PARQUET})
        self._purge(f"/v1/jobs/{job_id}")

    def chain(self) -> None:
        """A copy, a quantized copy of that, and what it lost."""
        copied = self._succeed(quantize(self._good, "parquet", skip=["*"]))
        source = {"type": "job", "job_id": copied}
        quantized = self._succeed(quantize(source, "compressed-tensors", method="minmax"))
        body = {"kind": "validate", "original": source, "quantized": {"type": "job", "job_id": quantized}}
        for job_id in (self._succeed(body), quantized, copied):
            self._purge(f"/v1/jobs/{job_id}")

    def cancel(self) -> None:
        """A slow job, cancelled somewhere."""
        job_id = self._create("/v1/jobs", quantize(self._good, "parquet", **SLOW))["id"]
        threading.Event().wait(self._rng.uniform(0, 0.5))
        self._answer({200, 202}, "DELETE", f"/v1/jobs/{job_id}")
        self._end(job_id)
        self._purge(f"/v1/jobs/{job_id}")

    def fail(self) -> None:
        """A model with a NaN."""
        job_id = self._create("/v1/jobs", quantize(self._sick, "parquet"))["id"]
        job = self._end(job_id)
        assert job["error"]["code"] == "non_finite_weights", job
        self._purge(f"/v1/jobs/{job_id}")

    def batch(self) -> None:
        """Four jobs in one call."""
        models = (self._good, self._good, self._sick, self._good)
        items = [quantize(model, "parquet", method="minmax") for model in models]
        batch = self._create("/v1/batches", {"items": items})
        path = f"/v1/batches/{batch['id']}"
        if self._rng.random() < 0.5:
            self._answer({200, 202}, "DELETE", path)
        with connect_sse(self._http, "GET", f"{path}/events") as source:
            ends = Counter(event.event for event in source.iter_sse())
        assert sum(ends[f"job.{status}"] for status in TERMINAL) == len(items), ends
        self._purge(path)

    def upload(self) -> None:
        """A model of its own in two pieces, and a job on it."""
        data = renamed(self._good, self._rng.getrandbits(32))
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        path, cut = f"/v1/blobs/{digest}", self._rng.randrange(1, len(data))
        for status, start, stop in ((202, 0, cut), (201, cut, len(data))):
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            self._answer(status, "PUT", path, content=data[start:stop], headers=headers)
        source = {"type": "blobs", "files": {"model.safetensors": digest}}
        self._purge(f"/v1/jobs/{self._succeed(quantize(source, 'parquet', method='minmax'))}")

    def hang_up(self) -> None:
        """A reader that goes in the middle of a running job."""
        job_id = self._create("/v1/jobs", quantize(self._good, "parquet", **SLOW))["id"]
        with httpx.Client(base_url=self._http.base_url, timeout=60.0) as once:
            for _ in range(5):
                with once.stream("GET", f"/v1/jobs/{job_id}/events") as response:
                    next(response.iter_raw())
        self._answer({200, 202}, "DELETE", f"/v1/jobs/{job_id}")
        self._end(job_id)
        self._purge(f"/v1/jobs/{job_id}")

    def mistake(self) -> None:
        """Calls that are refused."""
        good = quantize(self._good, "parquet")
        self._answer(422, "POST", "/v1/jobs", json=good | {"surprise": 1})
        self._answer(422, "POST", "/v1/jobs", json=good | {"config": {"bit_width": 9}})
        self._answer({403, 422}, "POST", "/v1/jobs", json=quantize(Path("/etc"), "parquet"))
        self._answer({400, 422}, "POST", "/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})
        self._answer(413, "POST", "/v1/jobs", content=b" " * (2 << 20), headers={"Content-Type": "application/json"})
        self._answer(404, "GET", "/v1/jobs/job_nobody/events")
        self._answer(405, "PATCH", "/v1/jobs")
        wrong = f"/v1/blobs/sha256:{self._rng.getrandbits(256):064x}"
        self._answer(400, "PUT", wrong, content=self._rng.randbytes(100_000))
        self._answer(422, "POST", "/v1/tensors:quantize", content=b"no arrow", headers={"Content-Type": ARROW})

    def plan(self) -> None:
        """A dry run."""
        self._answer(200, "POST", "/v1/plans", json=quantize(self._good, "parquet", "compressed-tensors"))

    def tables(self) -> None:
        """Small tensors there and back."""
        weights = np.random.default_rng(self._rng.getrandbits(32)).standard_normal((64, 1024), np.float32)
        table = pa.table({"layer_name": ["a"], "weights": [weights.reshape(-1)], "shape": [[64, 1024]]})
        quantized = self._table("quantize", table)
        back = self._table("dequantize", quantized)
        both = {"layer_name": ["a"], "weights": table["weights"], "other": back["weights"]}
        assert self._table("compare", pa.table(both))["cosine_similarity"][0].as_py() > 0.9

    def browse(self) -> None:
        """What changes nothing."""
        for path in ("/v1/jobs?limit=5", "/v1/jobs?status=succeeded", "/v1/batches", "/v1/formats", "/v1/backends"):
            self._answer(200, "GET", path)
        for path in ("/healthz", "/readyz", "/openapi.json"):
            self._answer(200, "GET", path)

    # --- steps ---

    def _answer(self, status: int | set[int], method: str, path: str, **sent: object) -> httpx.Response:
        response = self._http.request(method, path, **sent)  # type: ignore[arg-type]
        wanted = {status} if isinstance(status, int) else status
        assert response.status_code in wanted, f"{method} {path}: {response.status_code} {response.text[:500]}"
        return response

    def _create(self, path: str, body: Json, headers: dict[str, str] | None = None) -> Json:
        return dict(self._answer(202, "POST", path, json=body, headers=headers).json())

    def _end(self, job_id: str) -> Json:
        while True:
            job = self._answer(200, "GET", f"/v1/jobs/{job_id}", headers={"Prefer": "wait=30"}).json()
            if job["status"] in TERMINAL:
                return dict(job)

    def _succeed(self, body: Json) -> str:
        job = self._end(self._create("/v1/jobs", body)["id"])
        assert job["status"] == "succeeded", job
        return str(job["id"])

    def _follow(self, job_id: str) -> Counter[str]:
        with connect_sse(self._http, "GET", f"/v1/jobs/{job_id}/events") as source:
            return Counter(event.event for event in source.iter_sse())

    def _fetch_in_ranges(self, path: str, entry: Json) -> None:
        size = entry["size_bytes"]
        cut = self._rng.randrange(1, size) if size > 1 else 1
        pieces = [self._answer(206, "GET", path, headers={"Range": f"bytes=0-{cut - 1}"}).content]
        if cut < size:
            pieces.append(self._answer(206, "GET", path, headers={"Range": f"bytes={cut}-"}).content)
        assert hashlib.sha256(b"".join(pieces)).hexdigest() == entry["sha256"], entry

    def _purge(self, path: str) -> None:
        self._answer(204, "DELETE", path, params={"purge": "true"})

    def _table(self, verb: str, table: pa.Table) -> pa.Table:
        headers = {"Content-Type": ARROW}
        content = bytes(write_table(table))
        return read_table(self._answer(200, "POST", f"/v1/tensors:{verb}", content=content, headers=headers).content)


class Traffic:
    """Several customers at once, each in a thread, until they are told to finish."""

    def __init__(self, customers: int, url: str, models: Path, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(customers, thread_name_prefix="customer")
        self._begin = [
            partial(self._live, Customer(url, models, random.Random(f"{seed}/{number}")), number)
            for number in range(customers)
        ]
        self._lives: list[Future[None]] = []

    def start(self) -> None:
        """Begin."""
        self._lives = [self._pool.submit(begin) for begin in self._begin]

    @property
    def has_failed(self) -> bool:
        """Whether something went wrong in any."""
        return any(life.done() and life.exception() for life in self._lives)

    def finish(self) -> None:
        """Let each end what it is at; raises what went wrong in any."""
        self._over.set()
        self._pool.shutdown()
        for life in self._lives:
            life.result()

    def _live(self, customer: Customer, number: int) -> None:
        works = list(customer.works().items())
        with closing(customer):
            while not self._over.is_set():
                # Each begins with another, so that a short soak has all kinds as well.
                name, work = works[number % len(works)]
                work()
                self.done[name] += 1
                number += 1


def write_models(real: Path, folder: Path) -> None:
    """`good`, a part of a real model, and `sick`, with a NaN in it."""
    write_slice(real, folder / "good")
    (folder / "sick").mkdir()
    weights = np.ones((256, 256), np.float32)
    weights[7, 7] = np.nan
    save_file({"sick.weight": weights}, folder / "sick" / "model.safetensors")
