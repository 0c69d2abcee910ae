"""A real server process with a data folder of its own, and the few calls that benchmarks make."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, aconnect_sse

START_TIMEOUT_S = 120.0
WAIT_S = 60
_STALLS = re.compile(r'^arrowquant_event_loop_late_seconds_bucket\{le="([^"]+)"\} (\S+)$', re.MULTILINE)
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    url: str
    pid: int
    data_dir: Path


@contextmanager
def started(folder: Path, model_root: Path) -> Iterator[Server]:
    """A server with the settings it has by default; stopped and its data removed afterwards."""
    port, data_dir = _free_port(), folder / "data"
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--data-dir", str(data_dir)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ARROWQUANT_")}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen([*command, "--model-root", str(model_root)], stdout=log, stderr=log, env=environment)
        try:
            server = Server(f"http://127.0.0.1:{port}", process.pid, data_dir)
            _wait_until_ready(server, process, folder / "server.log")
            yield server
        except BaseException as error:
            error.add_note(f"The server's log ends so:\n{(folder / 'server.log').read_text()[-3000:]}")
            raise
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            shutil.rmtree(data_dir, ignore_errors=True)


class Client:
    """One connection pool to the server; use as a context."""

    def __init__(self, server: Server) -> None:
        self.http = httpx.AsyncClient(base_url=server.url, timeout=WAIT_S + 15)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def submit(self, source: Path, **config: Any) -> str:
        """Create a job with both outputs; its id."""
        response = await self.http.post("/v1/jobs", json=body(source, **config))
        if response.status_code != 202:
            raise RuntimeError(f"the server answered {response.status_code}: {response.text}")
        return str(response.json()["id"])

    async def ended(self, job_id: str) -> dict[str, Any]:
        """The job, as soon as it has ended."""
        while True:
            response = await self.http.get(f"/v1/jobs/{job_id}", headers={"Prefer": f"wait={WAIT_S}"})
            job: dict[str, Any] = response.raise_for_status().json()
            if job["status"] in TERMINAL:
                return job

    async def succeeded(self, job_id: str) -> None:
        """Wait until the job has ended; raises RuntimeError when it has not succeeded."""
        job = await self.ended(job_id)
        if job["status"] != "succeeded":
            raise RuntimeError(f"job {job_id} is {job['status']}: {job.get('error')}")

    async def cancel(self, job_id: str) -> None:
        """Ask for the job's end; does not wait for it."""
        (await self.http.delete(f"/v1/jobs/{job_id}")).raise_for_status()

    async def purge(self, job_id: str) -> None:
        """Remove an ended job and its files."""
        (await self.http.delete(f"/v1/jobs/{job_id}", params={"purge": "true"})).raise_for_status()

    async def events(self, job_id: str) -> AsyncIterator[ServerSentEvent]:
        """All events of the job until it ends."""
        async with aconnect_sse(self.http, "GET", f"/v1/jobs/{job_id}/events") as source:
            async for event in source.aiter_sse():
                yield event

    async def under_way(self, job_id: str) -> None:
        """Wait until the job computes: until it reports that some of its bytes are done."""
        async for event in self.events(job_id):
            if event.event == "job.progress" and event.json()["progress"]["bytes_done"] > 0:
                return
            if event.event.removeprefix("job.") in TERMINAL:
                raise RuntimeError(f"job {job_id} ended before it could be watched: {event.data}")

    async def stalls(self) -> dict[float, int]:
        """How often the server's event loop was looked at and late by no more than each of these seconds."""
        text = (await self.http.get("/metrics")).raise_for_status().text
        return {float(bound): int(float(count)) for bound, count in _STALLS.findall(text)}


def body(source: Path, **config: Any) -> dict[str, Any]:
    """A request for 4 bits, minmax, both outputs; nothing is taken twice."""
    return {
        "kind": "quantize",
        "source": {"type": "uri", "uri": source.as_uri()},
        "config": {"bit_width": 4, "method": "minmax", "symmetric": False, "min_accuracy": 0.0} | config,
        "outputs": [{"format": "compressed-tensors"}, {"format": "parquet"}],
    }


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server was not ready after {START_TIMEOUT_S:.0f} s:\n{log.read_text()[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
