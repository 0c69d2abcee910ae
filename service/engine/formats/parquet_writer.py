"""Writes the Parquet layout: tensors are spooled as they come, and become files in the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.engine.formats.base import Cancelled, ModelWriter, WriterContext
from service.engine.formats.parquet_schema import (
    BYTE_COLUMNS,
    FORMAT_VERSION,
    METADATA_PREFIX,
    SCHEMA,
    SUFFIX,
    model_cells,
    tensor_cells,
)
from service.engine.formats.parquet_spool import CHUNK_BYTES, NOTHING, Chunk, Spool
from service.engine.metrics import Quality
from service.engine.packing import WORD_BITS, pack_flat, unpack_rows
from service.engine.schemes.base import Scheme
from service.engine.tensors import DTYPE_BITS, CodeArray, QuantizedRows, TensorInfo
from service.storage.faults import storage_faults

ROW_GROUP_BYTES = 64 << 20
ROW_GROUP_ROWS = 1000
#: Statistics of the others would hold whole cells.
STATISTICS = ["layer_name", "dtype", "quant_type", "packing", "scale_dtype", "modality", "chunk_index"]


@dataclass(slots=True)
class _Row:
    cells: dict[str, Any]
    index: int
    chunk: Chunk


class ParquetWriter(ModelWriter):
    """See `ModelWriter`."""

    def __init__(self, folder: Path, context: WriterContext, max_file_bytes: int) -> None:
        super().__init__(folder, context)
        layout = context.layout
        self._folder = folder / layout.weights_dir
        with storage_faults("making the output's folder"):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._spool = Spool(self._folder, layout.stem, max_file_bytes)
        self._rows: list[_Row] = []
        self._told: list[dict[str, Any]] = []
        self._info: TensorInfo | None = None
        self._scheme: Scheme | None = None
        self._done = 0  # rows of a quantized tensor, bytes of a copied one

    def begin(self, info: TensorInfo, scheme: Scheme | None) -> None:
        """See `ModelWriter.begin`."""
        self._info, self._scheme, self._done = info, scheme, 0

    def write_rows(self, rows: QuantizedRows) -> None:
        """See `ModelWriter.write_rows`."""
        bits, per_tensor = rows.scheme.bits, rows.scheme.granularity == "tensor"
        step = max(1, CHUNK_BYTES * 8 // max(1, rows.cols * bits) // WORD_BITS) * WORD_BITS
        for start in range(0, rows.rows, step):
            piece = slice(start, start + step)
            packed = rows.packed[piece]
            which = slice(None) if per_tensor else piece
            self._spool.append(
                self._done * rows.cols,
                packed.shape[0] * rows.cols * bits,
                _bit_stream(packed, bits, rows.cols),
                np.ascontiguousarray(rows.scale[which]).reshape(-1).view(np.uint8),
                NOTHING if rows.zero_point is None else rows.zero_point[which].reshape(-1),
                once=per_tensor,
            )
            self._done += packed.shape[0]

    def write_raw(self, data: memoryview) -> None:
        """See `ModelWriter.write_raw`."""
        assert self._info is not None
        while data:
            piece = data[: CHUNK_BYTES - self._done % CHUNK_BYTES]
            offset = self._done * 8 // DTYPE_BITS[self._info.dtype]
            self._spool.append(offset, piece.nbytes * 8, piece, NOTHING, NOTHING, once=False)
            self._done += piece.nbytes
            data = data[piece.nbytes :]

    def commit(self, quality: Quality | None) -> int:
        """See `ModelWriter.commit`."""
        info = self._info
        assert info is not None
        expected = info.nbytes if self._scheme is None else info.rows
        if self._done != expected:
            raise ValueError(f"{self._done} of {expected} rows or bytes of {info.name!r} were written")
        if not info.size:  # a tensor without elements has its row as well
            self._spool.append(0, 0, memoryview(b""), NOTHING, NOTHING, once=False)
        chunks = self._spool.commit()
        cells = tensor_cells(info, self._scheme, quality)
        if self._scheme is not None:
            cells["symmetric"] = self._scheme.symmetric  # not a column: says whether zero points are null
        self._rows += (_Row(cells, index, chunk) for index, chunk in enumerate(chunks))
        self._told.append({"cells": cells, "chunks": [chunk.as_json() for chunk in chunks]})
        self._info = None
        return sum(chunk.size(column) for chunk in chunks for column in range(len(BYTE_COLUMNS)))

    def abandon(self) -> None:
        """See `ModelWriter.abandon`."""
        self._info = None
        self._spool.abandon()

    def state(self) -> dict[str, Any]:
        """See `ModelWriter.state`."""
        told, self._told = self._told, []
        return {"tensors": told}

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """See `ModelWriter.restore`."""
        tensors = [tensor for state in states for tensor in state["tensors"]]
        self._rows = [
            _Row(tensor["cells"], index, Chunk.of(chunk))
            for tensor in tensors
            for index, chunk in enumerate(tensor["chunks"])
        ]
        # A file under its final name is whole: it was renamed when it was.
        done = {file for file in range(self._file_count()) if self._path(file).exists()}
        self._spool.restore(self._rows[-1].chunk if self._rows else None, done)

    def close(self, cancelled: Cancelled) -> None:
        """See `ModelWriter.close`."""
        with storage_faults("writing the Parquet files"):
            for file in range(self._file_count()):
                if not self._path(file).exists() and not self._write_file(file, cancelled):
                    return
                self._spool.drop(file)
            self._spool.drop_all()
            self._write_metadata()

    def discard(self) -> None:
        """See `ModelWriter.discard`."""
        self._spool.close()

    def _file_count(self) -> int:
        return self._rows[-1].chunk.file + 1 if self._rows else 1

    def _write_file(self, file: int, cancelled: Cancelled) -> bool:
        path, beside = self._path(file), self._path(file).with_suffix(".spool")
        rows = [row for row in self._rows if row.chunk.file == file]
        # A file of Arrow's: one of Python's would get every page as a copy, made while all other threads wait.
        with (
            pa.OSFile(str(beside), "wb") as sink,
            pq.ParquetWriter(
                sink,
                SCHEMA.with_metadata(self._file_metadata()),
                compression="none",
                use_dictionary=False,
                write_statistics=STATISTICS,
                version="2.6",
            ) as writer,
        ):
            for group in _row_groups(rows):
                if cancelled():
                    return False
                writer.write_batch(self._batch(group), row_group_size=len(group))
        # Synced with all files of the output: until then a journal vouches for it, which a fallen machine voids.
        beside.replace(path)
        return True

    def _batch(self, rows: list[_Row]) -> pa.RecordBatch:
        shared = model_cells(self.context.layout)
        cells = [
            shared
            | row.cells
            | {"chunk_index": row.index, "chunk_offset": row.chunk.offset, "sha256": row.chunk.sha256}
            for row in rows
        ]
        columns = [
            self._byte_column(BYTE_COLUMNS.index(field.name), rows)
            if field.name in BYTE_COLUMNS
            else pa.array([c.get(field.name) for c in cells], field.type)
            for field in SCHEMA
        ]
        return pa.record_batch(columns, schema=SCHEMA.with_metadata(self._file_metadata()))

    def _byte_column(self, column: int, rows: list[_Row]) -> pa.Array[Any]:
        """Chunks follow each other in their spool file, so a column is one read."""
        first, last = rows[0].chunk, rows[-1].chunk
        start = first.starts[column]
        values = pa.py_buffer(self._spool.read(first.file, column, start, last.ends[column]))
        ends = [row.chunk.ends[column] - start for row in rows]
        offsets = pa.py_buffer(np.array([0, *ends], np.int64).tobytes())
        present = [_is_present(column, row) for row in rows]
        valid = pa.py_buffer(np.packbits(present, bitorder="little").tobytes())
        return pa.Array.from_buffers(
            pa.large_binary(), len(rows), [valid, offsets, values], null_count=len(rows) - sum(present)
        )

    def _file_metadata(self) -> dict[str, str]:
        context = self.context
        values = {
            "format_version": FORMAT_VERSION,
            "config": json.dumps(context.config, sort_keys=True),
            "source_fingerprint": context.layout.fingerprint,
            "service_version": context.service_version,
        }
        return {METADATA_PREFIX + key: value for key, value in values.items()}

    def _write_metadata(self) -> None:
        layout = self.context.layout
        stated = {"format": "parquet", "format_version": FORMAT_VERSION, **model_cells(layout)}
        (self.folder / "metadata.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")

    def _path(self, file: int) -> Path:
        return self._folder / f"{self.context.layout.stem}-{file:05d}{SUFFIX}"


def _bit_stream(packed: CodeArray, bits: int, cols: int) -> memoryview:
    """Rows without the bits that fill them up to whole words."""
    if cols * bits % WORD_BITS == 0:
        return np.ascontiguousarray(packed).reshape(-1).data
    return memoryview(pack_flat(unpack_rows(packed, bits, cols), bits))


def _row_groups(rows: list[_Row]) -> Iterator[list[_Row]]:
    group: list[_Row] = []
    size = 0
    for row in rows:
        if group and (len(group) == ROW_GROUP_ROWS or size + row.chunk.size(0) > ROW_GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(row)
        size += row.chunk.size(0)
    if group:
        yield group


def _is_present(column: int, row: _Row) -> bool:
    """Whether a cell of BYTE_COLUMNS holds something, be it empty, rather than null."""
    if BYTE_COLUMNS[column] == "data":
        return True
    if BYTE_COLUMNS[column] == "scales":
        return "scale_dtype" in row.cells
    return row.cells.get("symmetric") is False
