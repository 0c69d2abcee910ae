"""A Parquet file whose bytes come through an `OpenFile`, and a cache of the row group in use."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from service.engine.formats.parquet_guard import Refused, check_claims
from service.engine.formats.parquet_schema import BYTE_COLUMNS, LOW_RANK, SCHEMA
from service.errors import CorruptModel, UnsupportedModel
from service.storage.model_files import OpenFile

#: What is needed to know a tensor; metrics and reserved columns are not.
NEEDED = ("layer_name", "shape", "dtype", "num_params", "quant_type", "bit_width", "packing", "chunk_index",
          "chunk_offset", "scale_dtype", "quant_axis", "group_size", "is_diffusion_model", "modality",
          "sha256")  # fmt: skip
#: What files of earlier versions may not have.
OPTIONAL = ("block_rows", "tensor_scale")
#: The columns of bytes that every file has.
ALWAYS = tuple(column for column in BYTE_COLUMNS if column not in LOW_RANK)
#: What a row says of columns that its file does not have.
ABSENT = (*OPTIONAL, *(f"{column}_bytes" for column in LOW_RANK))
#: A number for each column of a tensor.
INPUT_SCALE = "input_scale"
#: What Arrow raises for strange content. What the system reports has become another error below it.
DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError)


class ParquetFile:
    """One file of a model. Threads may share it; they wait for each other."""

    def __init__(self, source: OpenFile) -> None:
        """Closes `source` in the end, also when it raises."""
        self.name = source.name
        self._lock = threading.Lock()
        self._source = source
        self._verified: set[tuple[int, int]] = set()
        self._cached: tuple[int, pa.RecordBatch] | None = None
        try:
            self._check_claims()
            with damage_in(self.name):
                self._parquet = pq.ParquetFile(pa.PythonFile(FileStream(self._source), mode="r"), pre_buffer=False)
                self._check_columns()
        except BaseException:
            self._source.close()
            raise

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._source.size

    @property
    def row_count(self) -> int:
        """Rows of all row groups."""
        return int(self._parquet.metadata.num_rows)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The cells of every row but the bytes: of these, `<column>_bytes` is the length, None where null.

        `data` itself is not read; `at` is (row group, row in it).
        """
        for group in range(self._parquet.num_row_groups):
            lengthy = [column for column in self._bytes if column != "data"]
            batch = self._read(group, [*self._known, *self._beside, *lengthy])
            with damage_in(self.name):
                cells = [dict.fromkeys(ABSENT) | row for row in batch.select(self._known).to_pylist()]
                for row, scale in zip(cells, batch[INPUT_SCALE] if self._beside else [], strict=False):
                    row[INPUT_SCALE] = scale.values.to_numpy(zero_copy_only=False) if scale.is_valid else None
                for column in lengthy:
                    lengths = pc.binary_length(cast(pa.LargeBinaryArray, batch[column])).to_pylist()
                    for row, length in zip(cells, lengths, strict=True):
                        row[f"{column}_bytes"] = length
            yield from (row | {"at": (group, i)} for i, row in enumerate(cells))

    def cells(self, at: tuple[int, int], sha256: str) -> list[memoryview]:
        """BYTE_COLUMNS of a row, empty where null; CorruptModel when the hash is wrong."""
        group, row = at
        with self._lock:
            if self._cached is None or self._cached[0] != group:
                self._cached = None  # before the next is read, so that there is never more than one
                self._cached = group, self._read(group, self._bytes)
            batch = self._cached[1]
        cells = [_cell(cast(pa.LargeBinaryArray, batch[column]), row) for column in self._bytes]
        cells += [memoryview(b"")] * (len(BYTE_COLUMNS) - len(cells))
        if at not in self._verified and hashlib.sha256(cells[0]).hexdigest() != sha256:
            raise CorruptModel(f"row {row} of row group {group} in {self.name} is damaged: its `sha256` is another's")
        self._verified.add(at)
        return cells

    def close(self) -> None:
        """Let go of the file."""
        self._source.close()

    def _read(self, group: int, columns: list[str]) -> pa.RecordBatch:
        with damage_in(self.name):
            table = self._parquet.read_row_group(group, columns=columns, use_threads=False)
            return table.combine_chunks().to_batches()[0] if table.num_rows else _empty(columns)

    def _check_claims(self) -> None:
        columns = frozenset({*NEEDED, *OPTIONAL, INPUT_SCALE, *BYTE_COLUMNS})
        try:
            check_claims(self._read_at, self._source.size, columns)
        except Refused as refused:
            raise CorruptModel(f"{self.name} is damaged, or made to do harm: {refused}") from refused

    def _read_at(self, offset: int, count: int) -> bytes:
        return self._source.read(offset, count).tobytes()

    def _check_columns(self) -> None:
        found = self._parquet.schema_arrow
        self._known = [*NEEDED, *(name for name in OPTIONAL if name in found.names)]
        self._beside = [INPUT_SCALE] if INPUT_SCALE in found.names else []
        self._bytes = [*ALWAYS, *(LOW_RANK if set(LOW_RANK) <= set(found.names) else ())]
        for column in (*self._known, *self._beside, *self._bytes):
            expected = SCHEMA.field(column).type
            if column not in found.names or found.field(column).type != expected:
                raise UnsupportedModel(f"{self.name} has no column {column!r} of type {expected}")


class FileStream(io.RawIOBase):
    """An OpenFile as Arrow wants to see it."""

    def __init__(self, source: OpenFile) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        return self._source.size

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._source.size - self._position)
        count = rest if size < 0 else min(size, rest)
        data = self._source.read(self._position, count)
        self._position += count
        return data.data  # type: ignore[return-value]  # any buffer will do, and is not copied


def _cell(column: pa.LargeBinaryArray, row: int) -> memoryview:
    """The bytes of a cell where they are: a scalar of Arrow's would be a copy."""
    _, offsets, values = column.buffers()
    if offsets is None or values is None:
        return memoryview(b"")
    start, stop = np.frombuffer(memoryview(offsets), np.int64)[column.offset + row :][:2]
    return memoryview(values)[start:stop]


def _empty(columns: list[str]) -> pa.RecordBatch:
    fields = [SCHEMA.field(column) for column in columns]
    return pa.record_batch([pa.array([], f.type) for f in fields], schema=pa.schema(fields))


@contextmanager
def damage_in(name: PurePosixPath) -> Iterator[None]:
    """Raise CorruptModel where Arrow trips over the content."""
    try:
        yield
    except DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorruptModel(f"{name} is damaged: {reason:.200}") from error
