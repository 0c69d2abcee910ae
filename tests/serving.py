"""A real server process for tests, and where it lies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_TIMEOUT_S = 120


@dataclass
class Served:
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def serving(data: Path, *roots: Path, port: int | None = None, **environment: str) -> Iterator[Served]:
    """`arrowquant serve` on a free port, ready; terminated at the end. Its log is beside `data`."""
    port = port or free_port()
    log = data.with_suffix(".log")
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--data-dir", str(data)]
    command += [part for root in roots for part in ("--model-root", str(root))]
    with log.open("ab") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=os.environ | environment)
    served = Served(port, process, log)
    try:
        _wait_until_ready(served)
        yield served
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(served: Served) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and served.process.poll() is None:
        try:
            if httpx.get(f"{served.url}/readyz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{served.log.read_text()}")
