"""Writes the Parquet layout: cuts tensors into rows, which go into their files as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import gcd, lcm
from pathlib import Path
from typing import Any

import numpy as np

from service.engine.beside import Beside
from service.engine.formats.base import Cancelled, ModelWriter, WriterContext
from service.engine.formats.parquet_groups import RowGroups
from service.engine.formats.parquet_pages import MAX_CELL_BYTES
from service.engine.formats.parquet_rows import Row
from service.engine.formats.parquet_schema import (
    BYTE_COLUMNS,
    FORMAT_VERSION,
    METADATA_PREFIX,
    SCHEMA,
    model_cells,
    quality_cells,
    tensor_cells,
)
from service.engine.metrics import Quality
from service.engine.packing import WORD_BITS, pack_flat, unpack_rows
from service.engine.schemes.base import TENSOR_SCALE_BYTES, Scheme
from service.engine.tensors import DTYPE_BITS, Array, CodeArray, HalfArray, QuantizedRows, TensorInfo
from service.errors import UnsupportedModel
from service.storage.faults import storage_faults

#: Bytes of `data` in one row of the file; 24 divides it, and so do the elements of every dtype.
CHUNK_BYTES = (32 << 20) // 24 * 24
#: Codes that are unpacked and packed again at once, where rows of a tensor do not end on whole words.
REPACKED_CODES = 1 << 20


class ParquetWriter(ModelWriter):
    """See `ModelWriter`."""

    def __init__(self, folder: Path, context: WriterContext, max_file_bytes: int) -> None:
        super().__init__(folder, context)
        layout = context.layout
        weights = folder / layout.weights_dir
        with storage_faults("making the output's folder"):
            weights.mkdir(parents=True, exist_ok=True)
        schema = SCHEMA.with_metadata(self._file_metadata())
        self._groups = RowGroups(weights, layout.stem, max_file_bytes, schema, model_cells(layout))
        self._told: list[dict[str, Any]] = []
        self._info: TensorInfo | None = None
        self._scheme: Scheme | None = None
        self._cells: dict[str, Any] = {}
        # In rows of a quantized tensor, in bytes of a copied one:
        self._done = self._end = 0  # of the tensor, and where the chunk in work ends
        self._total = self._step = 0
        self._count = 0  # chunks
        self._beside_bytes = 0
        self._down: HalfArray | None = None

    def begin(self, info: TensorInfo, scheme: Scheme | None, beside: Beside | None = None) -> None:
        """See `ModelWriter.begin`."""
        self._info, self._scheme, self._cells = info, scheme, tensor_cells(info, scheme)
        self._cells |= beside.cells() if beside is not None else {}
        self._down = beside.low_rank_down if beside is not None else None
        if self._down is not None:
            self._cells["low_rank"] = len(self._down)  # not a column: says whether there are these of bytes
        self._beside_bytes = beside.nbytes if beside is not None else 0
        self._done = self._end = self._count = 0
        if scheme is None:
            self._total, self._step = info.nbytes, CHUNK_BYTES
        else:
            self._cells["symmetric"] = scheme.symmetric  # not a column: says whether zero points are null
            multiple = scheme.row_multiple if scheme.granularity == "block" else 1
            self._total, self._step = info.rows, _rows_of_chunk(max(1, info.cols * scheme.bits), multiple)

    def write_rows(self, rows: QuantizedRows) -> None:
        """See `ModelWriter.write_rows`."""
        scheme, bits, per_tensor = rows.scheme, rows.scheme.bits, rows.scheme.granularity == "tensor"
        if rows.tensor_scale is not None:
            self._cells["tensor_scale"] = float(rows.tensor_scale)
        most = rows.rows if _is_aligned(rows.cols, bits) else max(1, REPACKED_CODES // rows.cols // 8) * 8
        start = 0
        with storage_faults("writing the weights"):
            while start < rows.rows:
                fresh = self._open_chunk()
                piece = slice(start, start + min(most, self._end - self._done, rows.rows - start))
                scales = zeros = None
                if fresh or not per_tensor:  # the whole tensor's go with each chunk once
                    which = slice(None) if per_tensor else slice(*(scheme.scale_rows(n) for n in (start, piece.stop)))
                    scales = _bytes(rows.scale[which])
                    zeros = None if rows.zero_point is None else _bytes(rows.zero_point[which])
                up = None if rows.up is None else _bytes(rows.up[piece])
                down = None if self._down is None or self._done else _bytes(self._down)  # with the first rows
                self._groups.add(_bit_stream(rows.packed[piece], bits, rows.cols), scales, zeros, up, down)
                self._done += piece.stop - start
                start = piece.stop

    def write_raw(self, data: memoryview) -> None:
        """See `ModelWriter.write_raw`."""
        with storage_faults("writing the weights"):
            while data:
                self._open_chunk()
                piece = data[: self._end - self._done]
                self._groups.add(piece)
                self._done += piece.nbytes
                data = data[piece.nbytes :]

    def commit(self, quality: Quality | None) -> int:
        """See `ModelWriter.commit`."""
        info = self._info
        assert info is not None
        if self._done != self._total:
            raise ValueError(f"{self._done} of {self._total} rows or bytes of {info.name!r} were written")
        self._cells.update(quality_cells(quality))
        with storage_faults("writing the weights"):
            if not self._count:  # a tensor without elements has its row as well
                self._groups.open_row(Row(self._cells, 0, 0, [0] * len(BYTE_COLUMNS)), 0)
            rows = self._groups.commit()
        self._told.append({"cells": self._cells, "rows": [row.as_json() for row in rows]})
        self._info = None
        parts = TENSOR_SCALE_BYTES * ("tensor_scale" in self._cells) + self._beside_bytes
        return sum(sum(row.sizes) for row in rows) + parts

    def abandon(self) -> None:
        """See `ModelWriter.abandon`."""
        self._info = None
        with storage_faults("writing the weights"):
            self._groups.abandon()

    def state(self) -> dict[str, Any]:
        """See `ModelWriter.state`."""
        told, self._told = self._told, []
        with storage_faults("writing the weights"):
            return {"tensors": told, **self._groups.state()}

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """See `ModelWriter.restore`."""
        tensors = (tensor for state in states for tensor in state["tensors"])
        rows = [Row.of(t["cells"], row) for t in tensors for row in t["rows"]]
        with storage_faults("taking up the work of an earlier run"):
            self._groups.restore(states, rows)

    def close(self, cancelled: Cancelled) -> None:
        """See `ModelWriter.close`."""
        with storage_faults("completing the Parquet files"):
            if self._groups.finish(cancelled):
                self._write_metadata()

    def digest(self, path: Path, advance: Callable[[int], None]) -> str | None:
        """See `ModelWriter.digest`."""
        with storage_faults("hashing the weights"):
            return self._groups.digest(path, advance)

    def discard(self) -> None:
        """See `ModelWriter.discard`."""
        self._groups.discard()

    def _open_chunk(self) -> bool:
        """Begin the next chunk when the last one is full; whether it was."""
        if self._done < self._end:
            return False
        info, scheme = self._info, self._scheme
        assert info is not None, "begin() comes first"
        size = min(self._step, self._total - self._done)
        if scheme is None:
            offset, nbytes = self._done * 8 // DTYPE_BITS[info.dtype], size
        else:
            offset, nbytes = self._done * info.cols, -(-size * info.cols * scheme.bits // 8)
        if nbytes > MAX_CELL_BYTES:
            raise UnsupportedModel(
                f"a row of tensor {info.name} takes {nbytes} bytes; in Parquet a cell has at most {MAX_CELL_BYTES}:"
                " name the tensor in `skip`, so that it is copied in pieces",
                tensor=info.name,
            )
        self._groups.open_row(Row(self._cells, self._count, offset, [0] * len(BYTE_COLUMNS)), nbytes)
        self._end, self._count = self._done + size, self._count + 1
        return True

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


def _rows_of_chunk(row_bits: int, multiple: int) -> int:
    """As many rows as fit, and at least so few that they are a multiple and end on a whole byte."""
    whole = lcm(8 // gcd(8, row_bits), multiple)
    return max(1, CHUNK_BYTES * 8 // row_bits // whole) * whole


def _is_aligned(cols: int, bits: int) -> bool:
    """Whether a packed row ends on a whole word, so that rows make a stream as they are."""
    return cols * bits % WORD_BITS == 0


def _bytes(parameters: Array) -> memoryview:
    """Scales or zero points as they are stored."""
    return np.ascontiguousarray(parameters).reshape(-1).view(np.uint8).data


def _bit_stream(packed: CodeArray, bits: int, cols: int) -> memoryview:
    """Rows without the bits that fill them up to whole words."""
    if _is_aligned(cols, bits):
        return np.ascontiguousarray(packed).reshape(-1).data
    return memoryview(pack_flat(unpack_rows(packed, bits, cols), bits))
