"""Very many readers of event streams in one process: `python -m bench.streams_client` with a request on stdin.

Plain sockets and as little parsing as will do, so that what is measured is the server.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

FIELDS = re.compile(rb"^(event|id): ?(.*)$", re.MULTILINE)
AT = re.compile(rb'"at":"([^"]+)"')
#: Without HTTP/1.1 there are no chunks to take apart.
CALL = "GET /v1/jobs/{job_id}/events HTTP/1.0\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
LAST = frozenset({"job.succeeded", "job.failed", "job.cancelled"})
AT_ONCE = 50
#: A reset instead of an orderly end.
NO_LINGER = struct.pack("ii", 1, 0)


@dataclass(slots=True)
class Heard:
    """What one reader got: ids of all but progress, and how late what happened while it listened was."""

    job_id: str
    ids: list[int] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)
    progress: int = 0
    last: str = ""


class Reader(asyncio.Protocol):
    """One stream, from its call to its end."""

    def __init__(self, job_id: str) -> None:
        self.heard = Heard(job_id)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rest = b""
        self._since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Call."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(CALL.format(job_id=self.heard.job_id).encode())

    def data_received(self, data: bytes) -> None:
        """Take frames apart; the head of the answer is the first of them."""
        now = time.time()
        self._since = self._since or now
        *frames, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for frame in frames:
            self._take(frame, now)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """The stream has ended."""
        if not self.ended.done():
            self.ended.set_result(None)

    def _take(self, frame: bytes, now: float) -> None:
        fields = {name: value.decode() for name, value in FIELDS.findall(frame)}
        type_ = fields.get(b"event")
        if type_ is None:
            return
        if type_ == "job.progress":
            self.heard.progress += 1
            return
        self.heard.last = type_
        if b"id" in fields:
            self.heard.ids.append(int(fields[b"id"]))
        found = AT.search(frame)
        at = datetime.fromisoformat(found[1].decode()).timestamp() if found else now
        if at > self._since:  # the others are read back
            self.heard.lags_s.append(now - at)


class Crowd:
    """Readers, and sockets that are no readers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._bad: list[socket.socket] = []

    async def read(self, job_id: str) -> Reader:
        """A stream that has begun."""
        async with self._gate:
            _, reader = await asyncio.get_running_loop().create_connection(
                lambda: Reader(job_id), "127.0.0.1", self._port
            )
            return reader

    async def ignore(self, job_id: str) -> None:
        """A connection that asks for a stream and never reads a byte of it."""
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        await self._call(deaf, job_id)
        self._bad.append(deaf)

    async def vanish(self, job_id: str, after_s: float) -> None:
        """A connection that asks for a stream and is reset in the middle of it, over and over."""
        while True:
            gone = socket.socket()
            await self._call(gone, job_id)
            await asyncio.sleep(after_s)
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            gone.close()

    def close(self) -> None:
        """Let go of the sockets."""
        for bad in self._bad:
            bad.close()

    async def _call(self, bad: socket.socket, job_id: str) -> None:
        bad.setblocking(False)
        loop = asyncio.get_running_loop()
        async with self._gate:
            await loop.sock_connect(bad, ("127.0.0.1", self._port))
            await loop.sock_sendall(bad, CALL.format(job_id=job_id).encode())


async def listen(port: int, job_ids: Sequence[str], deaf: int, resets: int) -> list[Heard]:
    """What a reader for each of `job_ids` hears to the end; the others are spread over the same jobs.

    Says `open` on stdout when all are there.
    """
    crowd = Crowd(port)
    for number in range(deaf):
        await crowd.ignore(job_ids[number % len(job_ids)])
    vanishing = [
        asyncio.create_task(crowd.vanish(job_ids[number % len(job_ids)], 2.0 + number % 50 / 10))
        for number in range(resets)
    ]
    readers = await asyncio.gather(*map(crowd.read, job_ids))
    print("open", flush=True)
    await asyncio.gather(*(reader.ended for reader in readers))
    for task in vanishing:
        task.cancel()
    await asyncio.gather(*vanishing, return_exceptions=True)
    crowd.close()
    return [reader.heard for reader in readers]


def main() -> None:
    """Read `{port, job_ids, deaf, resets}`, print what was heard and the processor time it took."""
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    heard = asyncio.run(listen(**asked))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"cpu_s": used.ru_utime + used.ru_stime, "heard": [asdict(one) for one in heard]}), flush=True)


if __name__ == "__main__":
    main()
