"""`arrowquant quantize --upload`: a model that only the client can read."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest

from tests.cli.test_cli import CONTROL, hashes, make_model, run
from tests.conftest import StartServer
from tests.server import Server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model outside of all roots."""
    folder = tmp_path_factory.mktemp("private") / "model"
    make_model(folder, tensors=16, rows=512)
    (folder / ".hidden").write_text("stays here")
    return folder


def upload(url: str, source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """The command."""
    return run("quantize", source, "--server", url, "--upload", "--out", out)


def address(path: Path) -> str:
    """Where the file is as a blob."""
    return f"/v1/blobs/sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def written(server: Server) -> int:
    """Bytes that the server has written to files."""
    return server.io()["wchar"]


class CuttingProxy:
    """A port that passes on to another, and hangs up once, when so many bytes have been sent through it."""

    def __init__(self, port: int, after: int) -> None:
        self.has_cut = False
        self._left = after
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listening]
        self._threads = [threading.Thread(target=self._accept)]
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in tuple(self._sockets):
            _shut(end)
        for thread in tuple(self._threads):
            thread.join()
        for end in self._sockets:
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self._sockets.append(client)
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets.append(server)
                for ends in ((client, server, True), (server, client, False)):
                    self._threads.append(threading.Thread(target=self._pump, args=ends))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if counts and self._is_over(len(data)):
                    break
                sink.sendall(data)
        _shut(source)
        _shut(sink)

    def _is_over(self, count: int) -> bool:
        self._left -= count
        if self._left >= 0 or self.has_cut:
            return False
        self.has_cut = True
        return True


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def test_an_uploaded_model_gives_the_same_files_as_one_quantized_here(
    start_server: StartServer, model: Path, tmp_path: Path
) -> None:
    server = start_server()
    here = run("quantize", model, "--out", tmp_path / "here")
    assert here.returncode == 0, here.stderr
    there = upload(server.base_url, model, tmp_path / "there")
    assert there.returncode == 0, there.stderr
    assert not CONTROL.search(there.stdout + there.stderr)
    for stage in ("100% hashing", "100% uploading"):
        assert stage in there.stderr
    ours, theirs = (hashes(tmp_path / name / "compressed-tensors") for name in ("here", "there"))
    weights = {name for name in theirs if name.endswith(".safetensors")}
    assert weights
    assert {name: theirs[name] for name in weights} == {name: ours[name] for name in weights}
    assert not list(server.data_dir.rglob(".hidden"))


def test_what_the_server_has_is_not_sent_again(start_server: StartServer, model: Path, tmp_path: Path) -> None:
    server = start_server()
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    part = len(data) * 3 // 4
    headers = {"Content-Range": f"bytes 0-{part - 1}/{len(data)}"}
    assert server.client.put(address(weights), content=data[:part], headers=headers).status_code == 202
    before = written(server)
    assert upload(server.base_url, weights, tmp_path / "a").returncode == 0
    first = written(server) - before
    before = written(server)
    assert upload(server.base_url, weights, tmp_path / "b").returncode == 0
    second = written(server) - before
    assert first - second == pytest.approx(len(data) - part, abs=200_000)
    assert hashes(tmp_path / "a" / "compressed-tensors") == hashes(tmp_path / "b" / "compressed-tensors")


def test_an_upload_that_is_cut_goes_on_by_itself(start_server: StartServer, model: Path, tmp_path: Path) -> None:
    server = start_server()
    with CuttingProxy(server.client.base_url.port or 0, after=9_000_000) as proxy:
        done = upload(proxy.url, model, tmp_path / "out")
    assert proxy.has_cut
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "report.json").read_text())["passed"]
    assert "Error by layer" in (tmp_path / "out" / "report.html").read_text()


def test_upload_needs_a_server_and_a_model(server: Server, model: Path, tmp_path: Path) -> None:
    nowhere = run("quantize", model, "--upload", "--out", tmp_path / "out")
    assert nowhere.returncode == 2
    assert "--server" in nowhere.stderr
    nothing = upload(server.base_url, tmp_path / "absent", tmp_path / "out")
    assert nothing.returncode == 1
    assert "does not exist" in nothing.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_into_the_model_that_is_sent(server: Server, model: Path) -> None:
    before = hashes(model)
    done = upload(server.base_url, model, model / "out")
    assert (done.returncode, hashes(model)) == (2, before)
    assert "lies in the model" in done.stderr


def test_folders_behind_links_are_sent_as_they_are_quantized_here(server: Server, model: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "tokenizer.json").write_text("{}")
    linking = tmp_path / "linking"
    linking.mkdir()
    (linking / "model.safetensors").symlink_to(next(model.glob("*.safetensors")))
    (linking / "tokenizer").symlink_to(tmp_path / "shared")
    done = upload(server.base_url, linking, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "compressed-tensors" / "tokenizer" / "tokenizer.json").read_text() == "{}"
