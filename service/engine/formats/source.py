"""Positioned reads of a file that somebody else may change: a change is an error, never a crash.

Files are read with `pread` into memory of our own instead of being mapped. A mapped file that is
cut short raises SIGBUS, which would end the process with all its jobs; and the copy is cheap
beside the arithmetic: it runs at the speed of memory, and what it holds is bounded by the blocks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from stat import S_ISREG

import numpy as np

from service.engine.buffers import Buffers
from service.engine.formats.walk import walk
from service.engine.tensors import CodeArray
from service.errors import ModelNotFound, SourceChanged
from service.storage.faults import storage_error
from service.storage.file import check_opened
from service.storage.model_files import Identity, Listing, ModelFiles, OpenFile

#: Smaller reads are of headers and small tensors, and tell nothing of what comes next.
BLOCK_BYTES = 1 << 20
#: What the disk is asked for beyond a block. The kernel does not read that far ahead by itself, and then waits.
AHEAD_BYTES = 64 << 20
#: Of one call; of more, the kernel would leave out the rest.
ADVISED_BYTES = 1 << 20


class LocalFiles(ModelFiles):
    """The files at a path on this machine."""

    def __init__(self, path: Path, roots: Sequence[Path] | None = None) -> None:
        """`path` is that of a folder, of a file, or of nothing; no file that is opened may lie outside the `roots`."""
        self._roots = roots
        is_folder = path.is_dir()
        self.root = path if is_folder else path.parent
        self.name = path.name
        self.entry = None if is_folder else PurePosixPath(path.name)
        self._buffers = Buffers()

    def exists(self) -> bool:
        """See `ModelFiles.exists`."""
        return self.root.exists() if self.entry is None else (self.root / self.entry).exists()

    def list(self) -> Listing:
        """See `ModelFiles.list`; also raises OSError."""
        found = walk(self.root)
        return Listing(found.files, found.warnings)

    def names_in(self, folder: PurePosixPath) -> Sequence[str]:
        """See `ModelFiles.names_in`."""
        return [path.name for path in (self.root / folder).iterdir()]

    def has(self, name: PurePosixPath) -> bool:
        """See `ModelFiles.has`."""
        return (self.root / name).is_file()

    def has_folder(self, name: PurePosixPath) -> bool:
        """See `ModelFiles.has_folder`."""
        return (self.root / name).is_dir()

    def size(self, name: PurePosixPath) -> int:
        """See `ModelFiles.size`."""
        return (self.root / name).stat().st_size

    def identity(self, name: PurePosixPath) -> Identity:
        """See `ModelFiles.identity`."""
        return _identity((self.root / name).stat())

    def open(self, name: PurePosixPath, expected: Identity | None = None) -> SourceFile:
        """See `ModelFiles.open`."""
        file = SourceFile(self.root, name, expected, self._buffers)
        if self._roots is not None:
            try:
                check_opened(file.descriptor, name.name, self._roots)
            except BaseException:
                file.close()
                raise
        return file


def _identity(stat: os.stat_result) -> Identity:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class SourceFile(OpenFile):
    """A file of this machine, open for reading."""

    def __init__(
        self, root: Path, name: PurePosixPath, expected: Identity | None = None, buffers: Buffers | None = None
    ) -> None:
        """Raises SourceChanged when it is another file than `expected`, ModelNotFound or StorageFailure."""
        self.name = name
        self._buffers = buffers or Buffers()
        self.path = root / name
        try:
            if not self.path.is_file():  # a pipe would block, a folder would fail later
                if expected is not None:
                    raise self._changed("was removed")
                raise ModelNotFound(f"There is no file {name} in the model.")
            # Nor may it block where a pipe has come into its place since.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise self._changed("was removed") from error
        except OSError as error:
            raise storage_error(error, f"opening {name}") from error
        stat = os.fstat(self._fd)
        if not S_ISREG(stat.st_mode):
            os.close(self._fd)
            raise self._changed("was replaced")
        self._size, self._identity = stat.st_size, _identity(stat)
        self._brought = 0
        self._closed = False
        if expected not in (None, self._identity):
            self.close()
            raise self._changed("was changed or replaced")

    @property
    def descriptor(self) -> int:
        """Of the open file."""
        return self._fd

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._size

    def read(self, offset: int, count: int) -> CodeArray:
        """`count` bytes from `offset` on; raises SourceChanged or StorageFailure."""
        data: CodeArray = self._buffers.empty((count,), np.uint8)
        view = data.data
        done = 0
        if count >= BLOCK_BYTES:
            self._bring(offset, offset + count)
        try:
            while done < count:
                got = os.preadv(self._fd, [view[done : done + (1 << 30)]], offset + done)
                if got == 0:
                    raise self._changed("is shorter than it was")
                done += got
        except OSError as error:
            raise storage_error(error, f"reading {self.name}") from error
        # Looked at after the read, so that what was read is known to be from before any change.
        self.check()
        return data

    def _bring(self, start: int, end: int) -> None:
        """Have the disk read what is wanted now and what will be next, all at once, as disks like it."""
        last = min(end + AHEAD_BYTES, self._size)
        if not start <= self._brought <= last:
            self._brought = start
        with suppress(AttributeError, OSError):  # not every system can be told, and reading will show what is wrong
            for at in range(self._brought, last, ADVISED_BYTES):
                os.posix_fadvise(self._fd, at, ADVISED_BYTES, os.POSIX_FADV_WILLNEED)
        self._brought = last

    def check(self) -> None:
        """Raises SourceChanged when the file is no longer the one that was opened."""
        try:
            now = _identity(self.path.stat())
        except FileNotFoundError as error:
            raise self._changed("was removed") from error
        except OSError as error:
            raise storage_error(error, f"reading {self.name}") from error
        if now != self._identity:
            raise self._changed("was changed or replaced")

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)

    def _changed(self, what: str) -> SourceChanged:
        return SourceChanged(f"{self.name} {what} while it was being read. Submit the job again when it is at rest.")
