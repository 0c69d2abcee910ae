"""What the service adds to the engine: to a job of one small tensor, and to a table of weights in one call."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from bench.bare_server import bare_server
from bench.common import MB, Samples, cores, measure
from bench.engine import BLOCK_BYTES, Job, make_backend, run
from bench.models import Model
from bench.server import Client, body
from service.engine.backends.base import Backend
from service.engine.config import Profile, QuantizationConfig, build, resolve
from service.engine.methods.registry import methods
from service.engine.table_io import read_table, write_table
from service.engine.tables import Tools, quantize_table

ARROW = "application/vnd.apache.arrow.stream"
#: 64 MB of weights, as matrices of one size.
TABLE_ROWS, TABLE_SHAPE = 16, (1000, 1000)
PIECE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class SmallJob:
    """Seconds from the start of a POST to the job's last event, and of the engine alone on the same file."""

    service: Samples
    engine: Samples

    @property
    def added(self) -> float:
        """What the service adds, in the median."""
        return self.service.median - self.engine.median


async def small_job(client: Client, one: Model, work: Path, formats: tuple[str, ...], count: int) -> SmallJob:
    """Jobs of one small tensor, each followed to its end; and as many runs of the engine in this process."""
    backend = await asyncio.to_thread(make_backend, cores())
    job = Job(one.path, work, formats)
    engine = await asyncio.to_thread(measure, lambda: run(job, backend), repeats=count, warm_up=3)
    request = body(one.path) | {"outputs": [{"format": name} for name in formats]}
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        response = await client.http.post("/v1/jobs", json=request)
        job_id = response.raise_for_status().json()["id"]
        async for _ in client.events(job_id):
            pass
        taken.append(time.perf_counter() - begun)
        await client.succeeded(job_id)
        await client.purge(job_id)
    return SmallJob(Samples(tuple(taken)), engine)


@dataclass(frozen=True, slots=True)
class TableCall:
    """Seconds for one table: kernels alone, all that the service does with its bytes, and the whole call.

    `loopback` is how long the same bytes take through a socket of this machine and back as long as the answer is,
    `bare` how long over HTTP to a server that does nothing with them.
    """

    method: str
    nbytes: int
    engine: Samples
    table: Samples
    call: Samples
    bare: Samples
    loopback: Samples


async def table_call(url: str, method: str, repeats: int) -> TableCall:
    """One table of 64 MB with one method; kernels and table are measured in this process."""
    weights = np.random.default_rng(0).standard_normal((TABLE_ROWS, *TABLE_SHAPE), np.float32)
    data = bytes(write_table(_table(weights)))
    backend = await asyncio.to_thread(make_backend, cores())
    config = resolve(Profile.LOCAL, [QuantizationConfig(bit_width=4, method=method)])
    scheme, chosen = build(config, "F32"), methods()[method]()

    def kernels() -> None:
        for x in weights:
            backend.quantize(x, scheme, chosen)

    def table() -> memoryview:
        return write_table(quantize_table(read_table(data), config, _tools(backend)))

    def measured() -> TableCall:
        engine = measure(kernels, repeats=repeats)
        with closing(HTTPConnection(urlsplit(url).netloc, timeout=60)) as connection:
            call = measure(lambda: _post(connection, data, method), repeats=repeats)
        answer = len(table())
        with bare_server(answer) as host, closing(HTTPConnection(host, timeout=60)) as connection:
            bare = measure(lambda: _post(connection, data, method), repeats=repeats)
        loopback = measure(lambda: _loopback(data, answer), repeats=repeats)
        return TableCall(method, weights.nbytes, engine, measure(table, repeats=repeats), call, bare, loopback)

    return await asyncio.to_thread(measured)


def table_row(measured: TableCall) -> list[str]:
    """As shown: milliseconds, rates, and shares of the kernels' rate."""
    engine = measured.engine.median
    parts = (measured.engine, measured.table, measured.call, measured.bare, measured.loopback)
    times = [f"{s.median * 1e3:.1f}" for s in parts]
    return [
        f"{measured.nbytes / MB:.0f} MB, {measured.method}",
        *times,
        f"{engine / measured.table.median:.2f}",
        f"{engine / measured.call.median:.2f}",
    ]


def _table(weights: np.ndarray[Any, np.dtype[np.float32]]) -> pa.Table:
    rows, count = len(weights), weights[0].size
    offsets = pa.array(np.arange(rows + 1, dtype=np.int64) * count)
    columns = {
        "layer_name": [f"layer{row}" for row in range(rows)],
        "weights": pa.LargeListArray.from_arrays(offsets, pa.array(weights.reshape(-1))),
        "shape": [list(weights.shape[1:])] * rows,
    }
    return pa.table(columns)


def _tools(backend: Backend) -> Tools:
    return Tools(backend, BLOCK_BYTES, lambda: False)


def _post(connection: HTTPConnection, data: bytes, method: str) -> None:
    connection.request("POST", f"/v1/tensors:quantize?method={method}&bit_width=4", data, {"Content-Type": ARROW})
    response = connection.getresponse()
    content = response.read()
    if response.status != HTTPStatus.OK:
        raise RuntimeError(f"the server answered {response.status}: {content[:300]!r}")


def _loopback(data: bytes, answer: int) -> None:
    """Send bytes through a socket and receive an answer: what no server of any kind can be faster than."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=_take_and_answer, args=(listening, len(data), answer))
        server.start()
        with socket.create_connection(listening.getsockname()) as ours:
            ours.sendall(data)
            _receive(ours, answer)
        server.join()


def _take_and_answer(listening: socket.socket, expected: int, answer: int) -> None:
    theirs, _ = listening.accept()
    with theirs:
        _receive(theirs, expected)
        theirs.sendall(bytes(answer))


def _receive(connection: socket.socket, count: int) -> None:
    # Into memory that is fresh, as a server's is.
    body = bytearray()
    while len(body) < count:
        body += connection.recv(PIECE_BYTES)
