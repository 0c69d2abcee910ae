"""Real stores on loopback: an S3 server, a hub, and a proxy between the service and either that breaks things."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx

#: What the service is given as credentials, and must never be seen anywhere.
ACCESS_KEY = "AKIAMARKEROFACCESS00"
SECRET_KEY = "marker-of-the-secret-key-0123456789abcdef"
HUB_TOKEN = "hf_markerOfTheHubTokenOfTheServer"
SECRETS = (ACCESS_KEY, SECRET_KEY, HUB_TOKEN)
#: Enough for moto, which looks at who calls and not at the signature.
SIGNED = {"authorization": f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20260101/us-east-1/s3/aws4_request"}
START_S = 60.0
COMMIT = "a" * 40


@dataclass(frozen=True)
class Call:
    """A request that a server here got."""

    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def range_bytes(self) -> int:
        """How many bytes it asked for; 0 when not for a range."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return int(found[2]) - int(found[1]) + 1 if found else 0


@dataclass
class Answer:
    """What to send back; `body` is cut after `cut` bytes, and then the connection."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


class Loopback(ABC):
    """A server in this process that answers as `respond` says, and remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                # Whoever hangs up is no news.
                with suppress(ConnectionError, BrokenPipeError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def answer(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                call = Call(self.command, self.path, headers)
                body = self.rfile.read(int(headers.get("content-length", 0)))
                outer.calls.append(call)
                answer = outer.respond(call, body)
                if answer is None:
                    self._reset()
                else:
                    self._send(answer)

            def _send(self, answer: Answer) -> None:
                self.send_response(answer.status)
                headers = {"Content-Length": str(len(answer.body))} | answer.headers
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: answer.cut])
                if answer.cut is not None:
                    self._reset()

            def _reset(self) -> None:
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @abstractmethod
    def respond(self, call: Call, body: bytes) -> Answer | None:
        """The answer; None resets the connection."""

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class Proxy(Loopback):
    """Hands calls on to another server, unless `fault` answers them, or changes what was answered."""

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self._upstream = urlsplit(upstream).netloc
        #: May answer in place of the server behind, or return the call's answer to be passed on after a change.
        self.fault: Callable[[Call, Callable[[], Answer]], Answer | None] = lambda _, answered: answered()

    def respond(self, call: Call, body: bytes) -> Answer | None:
        """See `Loopback.respond`."""
        return self.fault(call, lambda: self._pass_on(call, body))

    def _pass_on(self, call: Call, body: bytes) -> Answer:
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            headers = {n: v for n, v in call.headers.items() if n not in ("connection", "transfer-encoding")}
            connection.request(call.method, call.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            passed = {n: v for n, v in answer.getheaders() if n.lower() not in ("connection", "transfer-encoding")}
            if call.method != "HEAD":
                passed = {n: v for n, v in passed.items() if n.lower() != "content-length"}
            return Answer(answer.status, content, passed)
        finally:
            connection.close()


class GoogleStyle(Proxy):
    """Makes the S3 server answer as Google's XML interface does, which differs in names and conditions."""

    def _pass_on(self, call: Call, body: bytes) -> Answer:
        headers = dict(call.headers) | SIGNED
        if headers.pop("x-goog-if-generation-match", None) == "0":
            headers["if-none-match"] = "*"
        answer = super()._pass_on(Call(call.method, unquote(call.path), headers), body)
        answer.headers["x-goog-generation"] = "1"
        return answer


class S3:
    """A real S3 server in a process of its own, and what a tester does with it."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.client = httpx.Client(base_url=self.url, headers=SIGNED, timeout=60)
        deadline = time.monotonic() + START_S
        while True:
            with suppress(httpx.TransportError):
                self.client.get("/")
                return
            assert self._process.poll() is None, "moto's server has ended"
            assert time.monotonic() < deadline, "moto's server does not start"
            time.sleep(0.05)

    def bucket(self, name: str) -> str:
        """Make a bucket; its name."""
        assert self.client.put(f"/{name}").status_code == 200
        return name

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Store an object."""
        assert self.client.put(f"/{bucket}/{key}", content=data).status_code == 200

    def put_folder(self, bucket: str, prefix: str, folder: Path) -> str:
        """Store every file below a folder; the address."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(bucket, f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{bucket}/{prefix}"

    def files(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """Every object below a prefix, by its name there."""
        listing = self.client.get(f"/{bucket}", params={"list-type": "2", "prefix": prefix + "/"})
        assert listing.status_code == 200, listing.text
        keys = re.findall(r"<Key>([^<]*)</Key>", listing.text)
        return {key.removeprefix(prefix + "/"): self.client.get(f"/{bucket}/{key}").content for key in keys}

    def unfinished_uploads(self, bucket: str) -> int:
        """Multipart uploads that were neither completed nor aborted."""
        answer = self.client.get(f"/{bucket}?uploads")
        assert answer.status_code == 200, answer.text
        return answer.text.count("<UploadId>")

    def close(self) -> None:
        """End the process."""
        self.client.close()
        self._process.kill()
        self._process.wait()


@contextmanager
def running_s3() -> Iterator[S3]:
    """An S3 server."""
    s3 = S3()
    try:
        yield s3
    finally:
        s3.close()


@dataclass(frozen=True)
class Stored:
    """A file of a hub: large ones lie with another host."""

    data: bytes
    is_large: bool

    @property
    def tag(self) -> str:
        """SHA-256 of large ones, of others what git calls them."""
        if self.is_large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data, usedforsecurity=False).hexdigest()


class FileHost(Loopback):
    """Where a hub keeps large files: takes addresses that are signed, for as long as they are good."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.signature = "good-1"

    def respond(self, call: Call, body: bytes) -> Answer | None:
        """See `Loopback.respond`."""
        del body
        address = urlsplit(call.path)
        if address.query != f"Signature={self.signature}":
            return Answer(403, b"expired")
        return ranged(self.files[address.path.strip("/")], call, etag='"of-the-file-host"')


class Hub(Loopback):
    """The layout of a hub: what a model is made of, and where its files are; `token` has to come with every call."""

    def __init__(self, token: str | None = None) -> None:
        super().__init__()
        self.host = FileHost()
        self.token = token
        self.models: dict[str, dict[str, Stored]] = {}
        self.revisions: dict[str, str] = {"main": COMMIT}
        self.gated: set[str] = set()

    def put_folder(self, model: str, folder: Path, *, revision: str = COMMIT, prefix: str = "") -> str:
        """Store every file below a folder, weights as large ones; the address."""
        files = {
            f"{prefix}{path.relative_to(folder)}": Stored(path.read_bytes(), path.suffix == ".safetensors")
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.models[f"{model}@{revision}"] = files
        self.host.files |= {stored.tag: stored.data for stored in files.values() if stored.is_large}
        return f"hf://{model}@main"

    def respond(self, call: Call, body: bytes) -> Answer | None:
        """See `Loopback.respond`."""
        del body
        if self.token is not None and call.headers.get("authorization") != f"Bearer {self.token}":
            return Answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        path = unquote(urlsplit(call.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            return self._info(found[1], found[2])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path):
            return self._resolve(found[1], found[2], found[3], call)
        return Answer(404)

    def close(self) -> None:
        """Stop both servers."""
        self.host.close()
        super().close()

    def _info(self, model: str, revision: str) -> Answer:
        if model in self.gated:
            return Answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if not any(name.startswith(f"{model}@") for name in self.models):
            return Answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.revisions.get(revision, revision)
        if f"{model}@{commit}" not in self.models:
            return Answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [_sibling(name, stored) for name, stored in self.models[f"{model}@{commit}"].items()]
        info = {"id": model, "modelId": model, "sha": commit, "private": False, "siblings": siblings}
        return Answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _resolve(self, model: str, commit: str, name: str, call: Call) -> Answer:
        stored = self.models[f"{model}@{commit}"].get(name)
        if stored is None:
            return Answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        about = {"X-Repo-Commit": commit}
        if not stored.is_large:
            answer = ranged(stored.data, call, etag=f'"{stored.tag}"')
            answer.headers |= about
            return answer
        location = f"{self.host.url}/{stored.tag}?Signature={self.host.signature}"
        about |= {"X-Linked-Etag": f'"{stored.tag}"', "X-Linked-Size": str(len(stored.data)), "Location": location}
        return Answer(302, b"", about)


def _sibling(name: str, stored: Stored) -> dict[str, Any]:
    size = len(stored.data)
    entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": stored.tag[:40]}
    return entry | ({"lfs": {"sha256": stored.tag, "size": size, "pointerSize": 134}} if stored.is_large else {})


def ranged(data: bytes, call: Call, *, etag: str) -> Answer:
    """All of it, or the range asked for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", call.headers.get("range", ""))
    if not found:
        return Answer(200, data, {"ETag": etag, "Accept-Ranges": "bytes"})
    start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
    about = {"ETag": etag, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
    return Answer(206, data[start:stop], about)
