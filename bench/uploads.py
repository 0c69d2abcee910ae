"""Uploads of two gigabytes, whole and cut at a random byte: what memory they take of the server, and how long."""

from __future__ import annotations

import hashlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from bench.common import GIB, MB, MIB, note, table, write_result
from bench.models import scratch
from bench.resident import anonymous_bytes
from bench.server import Server, started

SIZE_BYTES = 2 * GIB
LIMIT_BYTES = 64 * MIB
SAMPLE_S = 0.002
TIMEOUT_S = 300.0
PACKAGES = ("uvicorn", "fastapi", "httpx")

ABOUT = f"""
A client sends a file of {SIZE_BYTES / GIB:.0f} GiB to a server on the same machine, over HTTP on loopback. *above* is
the most that the server's `RssAnon` was above what it had before, read every {SAMPLE_S * 1e3:.0f} ms: it may not pass
{LIMIT_BYTES // MIB} MiB. Times are the client's, from the first byte to the answer: by then the bytes are hashed and
on the disk. *cut*: the client hangs up at a random byte, asks how much has come, and sends the rest.
"""


@dataclass(frozen=True, slots=True)
class File:
    """Bytes that are made while they are sent: a block that is never twice the same."""

    size: int
    block: bytes = field(default_factory=lambda: secrets.token_bytes(MIB - 8))

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from start to stop."""
        for index in range(start // MIB, -(-stop // MIB)):
            piece = index.to_bytes(8) + self.block
            yield piece[max(0, start - index * MIB) : stop - index * MIB]

    def digest(self) -> str:
        """SHA-256 of all of it."""
        hashed = hashlib.sha256()
        for piece in self.pieces(0, self.size):
            hashed.update(piece)
        return hashed.hexdigest()


@dataclass
class Peak:
    """The largest value seen."""

    before: int
    highest: int


def main(size: int = SIZE_BYTES) -> None:
    """Measure, print and write the table; ends with status 1 when the limit is passed."""
    with scratch(2.5 * size) as folder:
        models = folder / "models"
        models.mkdir()
        with started(folder, models) as server:
            note("an upload in one go")
            rows = [_whole(server, File(size))]
            cut = 1 + secrets.randbelow(size - 1)
            note(f"an upload that is cut at byte {cut:,}")
            rows.append(_cut(server, File(size), cut))
    head = ("upload", "seconds", "MB/s", "RssAnon before", "above")
    cells = (
        (what, f"{s:.1f}", f"{size / MB / s:.0f}", f"{peak.before / MIB:.0f} MiB", f"{_above(peak) / MIB:.1f} MiB")
        for what, s, peak in rows
    )
    write_result("uploads", "Large uploads", ABOUT, table(head, cells), packages=PACKAGES)
    if max(_above(peak) for _, _, peak in rows) > LIMIT_BYTES:
        raise SystemExit("bench: memory is not bounded as promised")


def _whole(server: Server, file: File) -> tuple[str, float, Peak]:
    address = f"{server.url}/v1/blobs/sha256:{file.digest()}"
    with _peak(server) as peak:
        begun = time.perf_counter()
        headers = {"Content-Length": str(file.size)}
        _expect(httpx.put(address, content=file.pieces(0, file.size), headers=headers, timeout=TIMEOUT_S), 201)
        seconds = time.perf_counter() - begun
    _expect_whole(address, file)
    return "whole", seconds, peak


def _cut(server: Server, file: File, cut: int) -> tuple[str, float, Peak]:
    path = f"/v1/blobs/sha256:{file.digest()}"
    address = f"{server.url}{path}"
    with _peak(server) as peak:
        begun = time.perf_counter()
        _hang_up_at(server, path, file, cut)
        offset = _offset(address, cut)
        rest = {
            "Content-Range": f"bytes {offset}-{file.size - 1}/{file.size}",
            "Content-Length": str(file.size - offset),
        }
        _expect(httpx.put(address, content=file.pieces(offset, file.size), headers=rest, timeout=TIMEOUT_S), 201)
        seconds = time.perf_counter() - begun
    _expect_whole(address, file)
    return f"cut at byte {cut:,}, resumed at {offset:,}", seconds, peak


def _hang_up_at(server: Server, path: str, file: File, cut: int) -> None:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80)) as connection:
        head = f"PUT {path} HTTP/1.1\r\nHost: {url.netloc.decode()}\r\nContent-Length: {file.size}\r\n\r\n"
        connection.sendall(head.encode())
        for piece in file.pieces(0, cut):
            connection.sendall(piece)


def _offset(address: str, cut: int) -> int:
    """How much has come, once the server has seen the end of it."""
    deadline = time.monotonic() + TIMEOUT_S
    while (offset := int(httpx.head(address).headers["Upload-Offset"])) < cut:
        if time.monotonic() > deadline:
            raise SystemExit(f"bench: of {cut} bytes that were sent only {offset} are kept")
        time.sleep(0.01)
    return offset


def _expect(answer: httpx.Response, status: int) -> None:
    if answer.status_code != status:
        raise SystemExit(f"bench: {answer.status_code} where {status} was due: {answer.text}")


def _expect_whole(address: str, file: File) -> None:
    answer = httpx.head(address)
    _expect(answer, 200)
    if int(answer.headers["Content-Length"]) != file.size:
        raise SystemExit(f"bench: the blob has {answer.headers['Content-Length']} bytes, not {file.size}")


@contextmanager
def _peak(server: Server) -> Iterator[Peak]:
    """The largest memory of the server meanwhile."""
    found = Peak(before := anonymous_bytes(server.pid), before)
    over = threading.Event()

    def look() -> None:
        while not over.wait(SAMPLE_S):
            found.highest = max(found.highest, anonymous_bytes(server.pid))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield found
    finally:
        over.set()
        looking.join()


def _above(peak: Peak) -> int:
    return peak.highest - peak.before


if __name__ == "__main__":
    main()
