"""A network between the command and the server that loses answers, never calls."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.api.conftest import save_model
from tests.cli.test_cli import run
from tests.conftest import StartServer
from tests.server import Server

CREATES = b"POST /v1/jobs "


class LossyRelay:
    """Passes connections on to a server; of the first calls that create a job it cuts the answers off."""

    def __init__(self, server: Server, to_lose: int) -> None:
        self._address = (server.client.base_url.host, server.client.base_url.port or 80)
        self._to_lose = to_lose
        self.creations = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def close(self) -> None:
        """Take no more connections."""
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                there = socket.create_connection(self._address)
                threading.Thread(target=self._send, args=(client, there), daemon=True).start()
                threading.Thread(target=self._answer, args=(client, there), daemon=True).start()

    def _send(self, client: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                self.creations += data.startswith(CREATES)
                there.sendall(data)
        there.close()

    def _answer(self, client: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while data := there.recv(1 << 16):
                if self.creations and self.creations <= self._to_lose:
                    client.shutdown(socket.SHUT_RDWR)
                    break
                client.sendall(data)
        client.close()


@contextmanager
def lossy(server: Server, to_lose: int) -> Iterator[LossyRelay]:
    relay = LossyRelay(server, to_lose)
    try:
        yield relay
    finally:
        relay.close()


@pytest.mark.parametrize("to_lose", [0, 3])
def test_a_lost_answer_is_asked_for_again_and_there_is_one_job(
    start_server: StartServer, model_root: Path, tmp_path: Path, to_lose: int
) -> None:
    server = start_server()
    model = save_model(model_root / "small")
    with lossy(server, to_lose) as relay:
        done = run("quantize", model, "--format", "parquet", "--out", tmp_path / "out", "--server", relay.url)
    assert done.returncode == 0, done.stderr
    assert relay.creations == to_lose + 1
    assert (tmp_path / "out" / "parquet" / "manifest.json").exists()
    assert len(server.client.get("/v1/jobs").json()["data"]) == 1
