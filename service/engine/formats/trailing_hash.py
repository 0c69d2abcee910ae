"""The SHA-256 of a file, made while the file is written: it follows what is in the file for good."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path

from service.storage.durable import begin_writeback

CHUNK_BYTES = 1 << 20


class TrailingHash:
    """Of one file, which may be renamed meanwhile; one thread may ask."""

    def __init__(self, path: Path, first: bytes, thread: Executor) -> None:
        """`first` are the bytes that the file will begin with. `thread` hashes; raises OSError."""
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._thread = thread
        self._digest = hashlib.sha256(first)
        self._position = self._end = len(first)
        self._chunk = memoryview(bytearray(CHUNK_BYTES))  # used again: fresh memory takes longer than reading into it
        self._stop = threading.Event()
        self._running: Future[None] | None = None

    def follow(self, end: int) -> None:
        """Everything before `end` stays as it is, and may be hashed."""
        self._end = end
        if self._running is None or self._running.done():
            self._running = self._thread.submit(self._run)

    def finish(self, end: int, advance: Callable[[int], None]) -> str:
        """The digest in hexadecimal, now that the file is complete; `advance` is called with bytes just worked on.

        Raises OSError.
        """
        self._stop.set()
        if self._running is not None:
            self._running.result()
        self._end = end
        advance(self._position)
        while self._position < end:
            advance(self._take())
        return self._digest.hexdigest()

    def close(self) -> None:
        """Let go of the file."""
        self._stop.set()
        if self._running is not None:
            self._running.exception()
        os.close(self._file)

    def _run(self) -> None:
        while self._position < self._end and not self._stop.is_set():
            self._take()

    def _take(self) -> int:
        chunk = self._chunk[: self._end - self._position]
        count = os.preadv(self._file, [chunk], self._position)
        if not count:
            raise OSError(errno.EIO, "a file is shorter than what was written to it")
        begin_writeback(self._file, self._position, count)
        self._digest.update(chunk[:count])
        self._position += count
        return count
