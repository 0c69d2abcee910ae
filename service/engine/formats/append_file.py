"""A file that only grows at its end, until it is cut back to an earlier size."""

from __future__ import annotations

import errno
import os
from io import BufferedWriter, FileIO
from pathlib import Path

#: Small pieces are collected up to this; larger ones go to the kernel as they are.
BUFFER_BYTES = 128 << 10


class AppendFile:
    """Made with the first byte. What is written is safe from the end of this process after `flush`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BufferedWriter[FileIO] | None = None
        self._flushed = 0
        #: Bytes written so far.
        self.size = 0

    def take_up(self, size: int) -> None:
        """Go on behind so many bytes that an earlier process wrote; OSError when they are not there."""
        if size and (not self._path.exists() or self._path.stat().st_size < size):
            raise OSError(errno.EIO, "a file is shorter than what was written to it")
        if self._path.exists():
            os.truncate(self._path, size)
        self.size = self._flushed = size

    def pad(self, size: int) -> None:
        """Begin anew behind a hole of so many bytes."""
        self._path.write_bytes(b"")
        os.truncate(self._path, size)
        self.size = self._flushed = size

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        self.size += (self._file or self._opened()).write(data)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes that were written."""
        file, pieces = self._opened(), []
        if stop > self._flushed:
            self.flush()
        while start < stop:
            pieces.append(os.pread(file.fileno(), stop - start, start))
            if not pieces[-1]:
                raise OSError(errno.EIO, "a file is shorter than what was written to it")
            start += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def cut(self, size: int) -> None:
        """Drop all behind so many bytes."""
        if size < self.size:
            self._opened().seek(size)
            os.ftruncate(self._opened().fileno(), size)
            self.size = self._flushed = size

    def flush(self) -> None:
        """Give all to the kernel."""
        if self._file is not None and self._flushed < self.size:
            self._file.flush()
            self._flushed = self.size

    def close(self) -> None:
        """Flush and let go; another write opens it again."""
        self.flush()
        self.discard()

    def discard(self) -> None:
        """Let go of the file as it is."""
        if self._file is not None:
            self._file.raw.close()  # what is in the buffer, as after a failure, is not tried again
            self._file = None

    def remove(self) -> None:
        """It never was."""
        self.discard()
        self._path.unlink(missing_ok=True)

    def rename(self, path: Path) -> None:
        """Close, and give it its final name."""
        self.close()
        self._path.replace(path)

    def _opened(self) -> BufferedWriter[FileIO]:
        if self._file is None:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.lseek(descriptor, self.size, os.SEEK_SET)
            self._file = BufferedWriter(FileIO(descriptor, "wb"), BUFFER_BYTES)
        return self._file
