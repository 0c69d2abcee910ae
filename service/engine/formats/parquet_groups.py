"""Lays rows into Parquet files as they come; what cannot go to its place at once waits in a spool.

In a row group the cells of a column follow each other. So a large cell of `data` goes into the file as it comes, as a
page of its own. Small ones wait until they fill a page, `scales` and `zero_points` until their row group is full, all
other columns until the tensor is committed, whose errors are among them. A file only grows: to forget a tensor, or what
a killed process wrote behind its last journal line, is to cut the files.
"""

from __future__ import annotations

import errno
import hashlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from service.engine.formats.append_file import AppendFile
from service.engine.formats.base import Cancelled
from service.engine.formats.hashed_file import HashedFile
from service.engine.formats.parquet_cells import PAGE_BYTES, pages, write_page
from service.engine.formats.parquet_guard import MAGIC
from service.engine.formats.parquet_names import Names
from service.engine.formats.parquet_pages import (
    PREFIX_BYTES,
    Column,
    encode_columns,
    encode_footer,
    encode_group,
    encode_schema,
    moved,
    page_head,
    prefix,
)
from service.engine.formats.parquet_rows import Row, batch_of, read_cells
from service.engine.formats.parquet_schema import BYTE_COLUMNS, SCHEMA
from service.engine.formats.thrift_encode import Encoded

#: Whoever reads it holds it in memory.
ROW_GROUP_BYTES = 32 << 20
ROW_GROUP_ROWS = 1000
#: A cell of `data` of this size does not wait for others.
DIRECT_BYTES = 32 << 10
#: Written so much at once, a file is hashed on before its tensor is committed.
FOLLOWED_BYTES = 1 << 20

_DATA = BYTE_COLUMNS.index("data")


@dataclass(slots=True)
class _Group:
    """The row group in the making."""

    start: int  # where its pages begin in the file
    spooled: list[int]  # where its cells begin in the spool
    waiting: int  # where those of `data` begin there that are in no page yet
    rows: list[Row]
    data_bytes: int = 0
    paged: int = 0  # rows whose `data` are in the file


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A row group whose bytes are in the file; its other columns are not."""

    file: int
    start: int
    rows: list[Row]
    columns: list[Column]


@dataclass(frozen=True, slots=True)
class _Done:
    """A row group as the footer has it, and where it ends in the file."""

    file: int
    end: int
    rows: int
    encoded: bytes


class _Mark(NamedTuple):
    """How far all is as of the last commit; made for every tensor."""

    file: int
    size: int
    filled: int
    spool: list[int]
    done: int
    group: _Group
    # Of the group, which goes on changing:
    waiting: int
    rows: int
    data_bytes: int
    paged: int


class RowGroups:
    """Files `<stem>-00000.parquet`, …; a new one begins when the last has `max_file_bytes` of `data`.

    Everything raises OSError.
    """

    def __init__(self, folder: Path, stem: str, max_file_bytes: int, schema: pa.Schema, shared: dict[str, Any]) -> None:
        """`schema` is with the metadata of the files; `shared` are cells that all rows have."""
        self._names, self._max, self._schema, self._shared = Names(folder, stem), max_file_bytes, schema, shared
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._spool = [AppendFile(self._names.spool(column)) for column in range(len(BYTE_COLUMNS))]
        self._files = [self._file(0)]
        self._filled = 0  # bytes of `data` in the last file
        self._group = self._next_group()
        self._sealed: list[_Sealed] = []
        self._done: list[_Done] = []
        self._told = 0  # of those
        self._completed = 0  # files that have their end
        self._fresh: list[Row] = []  # since the last commit
        self._digest = hashlib.sha256()  # of `data` of the open row
        self._data: AppendFile = self._spool[_DATA]  # where they go
        self._mark = self._here()

    def open_row(self, row: Row, data_bytes: int) -> None:
        """The next row, whose `data` will take so many bytes."""
        self._close_row()
        full = len(self._group.rows) == ROW_GROUP_ROWS or self._group.data_bytes + data_bytes > ROW_GROUP_BYTES
        if full or self._filled >= self._max:
            self._seal()
        if self._filled >= self._max:
            self._files.append(self._file(len(self._files)))
            self._filled, self._group = 0, self._next_group()
        self._place(row, data_bytes)
        self._group.data_bytes += data_bytes
        self._filled += data_bytes
        self._fresh.append(row)
        self._digest = hashlib.sha256()

    def add(self, *pieces: memoryview | None) -> None:
        """Bytes of the row opened last, for each of BYTE_COLUMNS."""
        sizes = self._fresh[-1].sizes
        for column, piece in enumerate(pieces):
            if piece is not None:
                sizes[column] += piece.nbytes
                if column == _DATA:
                    self._data.write(piece)
                    self._digest.update(piece)
                    if piece.nbytes >= FOLLOWED_BYTES:
                        self._data.flush()
                else:
                    self._spool[column].write(piece)

    def commit(self) -> list[Row]:
        """The rows since the last commit, which are whole now and all of whose cells are known."""
        self._close_row()
        rows, self._fresh = self._fresh, []
        if self._sealed:
            self._seal()  # else the columns of those before would stand amid its own
        for number in range(self._mark.file, len(self._files) - 1):
            self._complete(number)
            self._files[number].complete_hash()
        self._mark = self._here()
        return rows

    def abandon(self) -> None:
        """Forget the rows since the last commit."""
        mark, group = self._mark, self._mark.group
        for file in self._files[mark.file + 1 :]:
            file.remove()
        del self._files[mark.file + 1 :]
        self._files[-1].cut(mark.size)
        for spool, size in zip(self._spool, mark.spool, strict=True):
            spool.cut(size)
        del self._done[mark.done :]
        del group.rows[mark.rows :]
        group.waiting, group.data_bytes, group.paged = mark.waiting, mark.data_bytes, mark.paged
        self._sealed, self._fresh, self._filled, self._group = [], [], mark.filled, group

    def state(self) -> dict[str, Any]:
        """Beside the rows, all that `restore` needs, as of the last commit: row groups since the last call."""
        for file in (*self._files[self._mark.file :], *self._spool):
            file.flush()
        mark, group = self._mark, self._mark.group
        told, self._told = self._done[self._told : mark.done], mark.done
        return {
            "groups": [[g.file, g.end, g.rows, b64encode(g.encoded).decode()] for g in told],
            "at": [mark.file, mark.size, mark.filled, mark.spool],
            "group": [group.start, group.spooled, mark.waiting, mark.data_bytes, mark.paged],
        }

    def restore(self, states: Sequence[dict[str, Any]], rows: list[Row]) -> None:
        """Take up the files of an earlier process, as of the last of these states, and all its rows."""
        last = 0
        if states:
            found = (g for state in states for g in state["groups"])
            self._done = [_Done(file, end, count, b64decode(data)) for file, end, count, data in found]
            self._told = len(self._done)
            last, size, self._filled, spool = states[-1]["at"]
            start, spooled, waiting, data_bytes, paged = states[-1]["group"]
            open_rows = rows[sum(group.rows for group in self._done) :]
            self._group = _Group(start, spooled, waiting, open_rows, data_bytes, paged)
            self._files = [self._file(number) for number in range(last + 1)]
            sizes = {group.file: group.end for group in self._done} | {last: size}
        else:
            sizes, spool = {0: 0}, [0] * len(self._spool)
        self._names.drop_behind(last)
        if self._names.final(last).exists():  # killed behind `finish`, or in it
            self._spool_again(spool)
        for number, file in enumerate(self._files):
            if not self._names.part(number).exists() and self._names.final(number).exists():
                self._names.final(number).rename(self._names.part(number))
            file.take_up(sizes[number])
            if number < last:
                file.forget_hash()  # it would have to be read again from its beginning
                self._complete(number)
        for waiting_file, nbytes in zip(self._spool, spool, strict=True):
            waiting_file.take_up(nbytes)
        self._mark = self._here()

    def finish(self, cancelled: Cancelled) -> bool:
        """Complete all files and give them their names; False when cancelled."""
        self._seal()
        for number in range(self._completed, len(self._files)):
            if cancelled():
                return False
            self._complete(number)
        for number, file in enumerate(self._files):
            # Synced with all files of the output: until then a journal vouches for it, which a fallen machine voids.
            file.rename(self._names.final(number))
        for spool in self._spool:
            spool.remove()
        return True

    def digest(self, path: Path, advance: Callable[[int], None]) -> str | None:
        """The SHA-256 of a finished file, if it was made on the way; see `ModelWriter.digest`."""
        return next((f.digest(advance) for n, f in enumerate(self._files) if self._names.final(n) == path), None)

    def discard(self) -> None:
        """Close the files as they are."""
        for file in (*self._files, *self._spool):
            file.discard()
        for hashed in self._files:
            hashed.forget_hash()
        self._hashing.shutdown()

    @cached_property
    def _encoded_schema(self) -> dict[int, Encoded]:
        return encode_schema(self._schema)

    def _complete(self, number: int) -> None:
        """Write the end of a file that nothing more comes to."""
        groups = [group for group in self._done if group.file == number]
        rows = sum(group.rows for group in groups)
        self._begun(self._files[number]).write(encode_footer(self._encoded_schema, [g.encoded for g in groups], rows))
        self._files[number].close()
        self._completed = number + 1

    def _place(self, row: Row, data_bytes: int) -> None:
        group = self._group
        direct = data_bytes >= DIRECT_BYTES
        if direct or self._spool[_DATA].size - group.waiting + data_bytes > PAGE_BYTES:
            self._page_waiting()
        group.rows.append(row)
        self._data = self._spool[_DATA]
        if direct:
            self._data = self._begun(self._files[-1])
            self._data.write(page_head([True], PREFIX_BYTES + data_bytes) + prefix(data_bytes))
            group.paged = len(group.rows)

    def _close_row(self) -> None:
        if self._fresh:
            self._fresh[-1].sha256 = self._digest.hexdigest()

    def _page_waiting(self) -> None:
        """Put the small cells of `data` that were spooled into the file."""
        group = self._group
        rows = group.rows[group.paged :]
        if rows:
            write_page(self._begun(self._files[-1]), self._spool[_DATA], _DATA, rows, group.waiting)
        group.waiting, group.paged = self._spool[_DATA].size, len(group.rows)

    def _seal(self) -> None:
        """End the row group, if there is something in it; complete those whose rows are all committed."""
        group, file = self._group, self._begun(self._files[-1])
        if group.rows:
            self._page_waiting()
            columns = [_column(_DATA, group.start, file.size, len(group.rows))]
            for column in range(len(BYTE_COLUMNS)):
                if column != _DATA:
                    start, at = file.size, group.spooled[column]
                    for rows in pages(group.rows, column):
                        at = write_page(file, self._spool[column], column, rows, at)
                    columns.append(_column(column, start, file.size, len(group.rows)))
            self._sealed.append(_Sealed(len(self._files) - 1, group.start, group.rows, columns))
        if not self._fresh:
            for sealed in self._sealed:
                self._done.append(self._described(sealed))
            self._sealed = []
        self._group = self._next_group()

    def _described(self, sealed: _Sealed) -> _Done:
        """Append the other columns, and describe them all."""
        file = self._files[sealed.file]
        pages, cells = encode_columns(batch_of(sealed.rows, self._shared))
        columns = {column.path[0]: column for column in (*sealed.columns, *moved(cells, file.size))}
        file.write(pages)
        ordered = [columns[name.encode()] for name in SCHEMA.names]
        return _Done(sealed.file, file.size, len(sealed.rows), encode_group(ordered, len(sealed.rows), sealed.start))

    def _spool_again(self, sizes: Sequence[int]) -> None:
        """Take the cells that waited in the spool from the finished file: the spool may be gone."""
        number, group = len(self._files) - 1, self._group
        index = sum(done.file == number for done in self._done)
        cells = read_cells(self._names.final(number), index) if group.rows else {}
        for column, name in enumerate(BYTE_COLUMNS):
            spool = AppendFile(self._names.spool(column))
            spool.pad(group.waiting if column == _DATA else group.spooled[column])
            for row in range(group.paged if column == _DATA else 0, len(group.rows)):
                spool.write(memoryview(cells[name][row].as_buffer()) if group.rows[row].has(column) else b"")
            spool.close()
            if spool.size != sizes[column]:
                raise OSError(errno.EIO, "a finished file is not what was written to it")

    def _begun(self, file: HashedFile) -> HashedFile:
        if not file.size:
            file.write(MAGIC)
        return file

    def _next_group(self) -> _Group:
        start = max(self._files[-1].size, len(MAGIC))
        return _Group(start, [file.size for file in self._spool], self._spool[_DATA].size, [])

    def _here(self) -> _Mark:
        group = self._group
        spool = [file.size for file in self._spool]
        at = len(self._files) - 1, self._files[-1].size, self._filled, spool, len(self._done)
        return _Mark(*at, group, group.waiting, len(group.rows), group.data_bytes, group.paged)

    def _file(self, number: int) -> HashedFile:
        return HashedFile(self._names.part(number), self._hashing)


def _column(column: int, start: int, end: int, values: int) -> Column:
    return Column((BYTE_COLUMNS[column].encode(),), start, end - start, values)
