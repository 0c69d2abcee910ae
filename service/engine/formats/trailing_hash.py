"""The SHA-256 of a file, made while the file is written: it follows what is in the file for good."""

from __future__ import annotations

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
        chunk = os.pread(self._file, min(CHUNK_BYTES, self._end - self._position), self._position)
        if not chunk:
            raise OSError("a file is shorter than what was written to it")
        begin_writeback(self._file, self._position, len(chunk))
        self._digest.update(chunk)
        self._position += len(chunk)
        return len(chunk)
