"""Where rows of a Parquet file wait until it is written: a Parquet file cannot be gone on with after a crash."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from service.engine.formats.parquet_schema import BYTE_COLUMNS
from service.engine.tensors import CodeArray
from service.storage.faults import storage_faults

#: Bytes of `data` in one row of the file; 24 divides it, and so do the elements of every dtype.
CHUNK_BYTES = (64 << 20) // 24 * 24
NOTHING = np.empty(0, np.uint8)


@dataclass(slots=True)
class Chunk:
    """A row in the making: where its bytes begin and end in the spool files of its file."""

    file: int
    offset: int  # in elements of the tensor
    starts: list[int]  # of each of BYTE_COLUMNS
    ends: list[int]
    sha256: str = ""

    def as_json(self) -> list[Any]:
        """For `of`."""
        return [self.file, self.offset, self.starts, self.ends, self.sha256]

    @classmethod
    def of(cls, value: list[Any]) -> Chunk:
        """The inverse of `as_json`."""
        return cls(*value)

    def size(self, column: int) -> int:
        """Bytes of one of BYTE_COLUMNS."""
        return self.ends[column] - self.starts[column]


@dataclass(slots=True)
class _Open:
    chunk: Chunk
    digest: Any = field(default_factory=hashlib.sha256)
    bits: int = 0


class Spool:
    """Appends chunks; each file of the output has one spool file for each of BYTE_COLUMNS."""

    def __init__(self, folder: Path, stem: str, max_file_bytes: int) -> None:
        self._folder, self._stem, self._max = folder, stem, max_file_bytes
        self._descriptors: dict[tuple[int, int], int] = {}  # by file and column
        self._committed = (0, [0, 0, 0])  # file, bytes of each spool file
        self._file, self._sizes = 0, [0, 0, 0]
        self._chunks: list[Chunk] = []
        self._open_chunk: _Open | None = None

    def append(
        self, offset: int, bits: int, data: memoryview, scales: CodeArray, zeros: CodeArray, *, once: bool
    ) -> None:
        """Bytes of a tensor's next elements, from `offset` on and taking `bits`; joined to the last chunk if they fit.

        `once` says that scales and zeros are the whole tensor's, and go with each chunk once.
        """
        open_ = self._open_chunk
        fits = open_ is not None and open_.bits % 8 == 0 and open_.chunk.size(0) + data.nbytes <= CHUNK_BYTES
        if open_ is None or not fits:
            open_ = self._next_chunk(offset)
        elif once:
            scales = zeros = NOTHING
        with storage_faults("writing the weights"):
            for column, piece in enumerate((data, scales.data, zeros.data)):
                self._write(column, piece)
        open_.digest.update(data)
        open_.bits += bits
        open_.chunk.ends = list(self._sizes)

    def commit(self) -> list[Chunk]:
        """The chunks since the last commit."""
        self._end_chunk()
        self._committed = self._file, list(self._sizes)
        chunks, self._chunks = self._chunks, []
        return chunks

    def abandon(self) -> None:
        """Forget the chunks since the last commit."""
        self._open_chunk, self._chunks = None, []
        self._file, self._sizes = self._committed[0], list(self._committed[1])

    def restore(self, last: Chunk | None, done: set[int]) -> None:
        """Cut the spool files off behind the last chunk kept; those of the files `done` are no longer needed."""
        if last is not None:
            self._committed = last.file, list(last.ends)
        self.abandon()
        with storage_faults("taking up the work of an earlier run"):
            for path in self._paths():
                number = int(path.name.removeprefix(f"{self._stem}.spool-").split(".")[0])
                if number > self._file or number in done:
                    path.unlink()
            for column, size in enumerate(self._sizes if self._file not in done else ()):
                file = self._descriptor(self._file, column)
                if os.fstat(file).st_size < size:
                    raise OSError(errno.EIO, "a spool file is shorter than what was written to it")
                os.ftruncate(file, size)

    def read(self, file: int, column: int, start: int, stop: int) -> bytes:
        """Bytes of a spool file."""
        descriptor, pieces = self._descriptor(file, column), []
        while start < stop:
            piece = os.pread(descriptor, stop - start, start)
            if not piece:
                raise OSError(errno.EIO, "a spool file is too short")
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def drop(self, file: int) -> None:
        """Remove the spool files of a file of the output."""
        self.close()
        for column in range(len(BYTE_COLUMNS)):
            self._path(file, column).unlink(missing_ok=True)

    def drop_all(self) -> None:
        """Remove all spool files, such as those of a tensor that was abandoned."""
        self.close()
        for path in self._paths():
            path.unlink()

    def close(self) -> None:
        """Close the files as they are."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _next_chunk(self, offset: int) -> _Open:
        self._end_chunk()
        if self._sizes[0] >= self._max:
            self.close()
            self._file, self._sizes = self._file + 1, [0, 0, 0]
        self._open_chunk = _Open(Chunk(self._file, offset, list(self._sizes), list(self._sizes)))
        return self._open_chunk

    def _end_chunk(self) -> None:
        if self._open_chunk is not None:
            self._open_chunk.chunk.sha256 = self._open_chunk.digest.hexdigest()
            self._chunks.append(self._open_chunk.chunk)
            self._open_chunk = None

    def _write(self, column: int, data: memoryview) -> None:
        rest = data.cast("B")
        while rest:
            written = os.pwrite(self._descriptor(self._file, column), rest, self._sizes[column])
            self._sizes[column] += written
            rest = rest[written:]

    def _descriptor(self, file: int, column: int) -> int:
        key = file, column
        if key not in self._descriptors:
            self._descriptors[key] = os.open(self._path(*key), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._descriptors[key]

    def _paths(self) -> Iterator[Path]:
        yield from (p for p in list(self._folder.iterdir()) if p.name.startswith(f"{self._stem}.spool-"))

    def _path(self, file: int, column: int) -> Path:
        return self._folder / f"{self._stem}.spool-{file:05d}.{BYTE_COLUMNS[column]}"
