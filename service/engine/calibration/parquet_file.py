"""Calibration in a Parquet file: a row is an array, with its name, its dtype, its shape and its bytes."""

from __future__ import annotations

import json
import math
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.engine.calibration.entries import (
    NUMBER_DTYPES,
    SHARED,
    CalibrationFile,
    Entry,
    checked_entry,
    parse_shared,
)
from service.engine.formats.parquet_file import FileStream, damage_in
from service.engine.formats.parquet_guard import Refused, check_claims
from service.engine.tensors import Array
from service.errors import CorruptModel, InvalidCalibration
from service.storage.model_files import OpenFile

#: `data` is little endian, in row-major order.
COLUMNS = {"name": pa.string(), "dtype": pa.string(), "shape": pa.list_(pa.int64()), "data": pa.large_binary()}


class ParquetCalibration(CalibrationFile):
    """Reads a row group at a time, and holds the one in use."""

    def __init__(self, source: OpenFile) -> None:
        super().__init__(source)
        self._name = source.name
        self._cached: tuple[int, list[memoryview]] | None = None
        try:
            check_claims(lambda offset, count: source.read(offset, count).tobytes(), source.size, frozenset(COLUMNS))
        except Refused as refused:
            raise CorruptModel(f"{self._name} is damaged, or made to do harm: {refused}") from refused
        with damage_in(self._name):
            self._parquet = pq.ParquetFile(pa.PythonFile(FileStream(source), mode="r"), pre_buffer=False)
        self._check_columns()
        self.entries, self._places = self._read_entries()
        metadata = self._parquet.schema_arrow.metadata or {}
        shared = metadata.get(SHARED.encode())
        self.shared = parse_shared(shared.decode(errors="replace") if shared is not None else None, str(self._name))
        listed = [(e.name, e.dtype, e.shape) for e in self.entries.values()]
        self.header = json.dumps([source.size, listed, self.shared]).encode()

    def read(self, entry: Entry, start: int, stop: int) -> Array:
        """See `CalibrationFile.read`."""
        group, row = self._places[entry.name]
        if self._cached is None or self._cached[0] != group:
            self._cached = None  # before the next is read, so that there is never more than one
            self._cached = group, self._cells(group)
        data = self._cached[1][row]
        if len(data) != entry.nbytes:
            raise InvalidCalibration(
                f"{entry.name!r} in {self._name} has {len(data)} bytes of data; {entry.dtype} of {list(entry.shape)}"
                f" takes {entry.nbytes}"
            )
        whole = np.frombuffer(data, NUMBER_DTYPES[entry.dtype]).reshape(entry.rows, *entry.shape[1:])
        return whole[start:stop]

    def held_bytes(self, entry: Entry) -> int:
        """See `CalibrationFile.held_bytes`: the row group, and its pages while they are unpacked."""
        group = self._places[entry.name][0]
        return 2 * sum(other.nbytes for name, other in self.entries.items() if self._places[name][0] == group)

    def _cells(self, group: int) -> list[memoryview]:
        with damage_in(self._name):
            column = self._parquet.read_row_group(group, columns=["data"], use_threads=False).column("data")
            if column.null_count:
                raise InvalidCalibration(f"a row of row group {group} in {self._name} has no data")
            return [memoryview(cell.as_buffer()) for cell in cast(list[Any], column)]

    def _check_columns(self) -> None:
        schema = self._parquet.schema_arrow
        for column, expected in COLUMNS.items():
            found = schema.field(column).type if column in schema.names else None
            if found != expected and not (column == "data" and found == pa.binary()):
                raise InvalidCalibration(f"{self._name} has no column {column!r} of type {expected}")

    def _read_entries(self) -> tuple[dict[str, Entry], dict[str, tuple[int, int]]]:
        entries: dict[str, Entry] = {}
        places: dict[str, tuple[int, int]] = {}
        for group in range(self._parquet.num_row_groups):
            with damage_in(self._name):
                head = ["name", "dtype", "shape"]
                rows = self._parquet.read_row_group(group, columns=head, use_threads=False).to_pylist()
            for at, row in enumerate(rows):
                entry = self._entry(row)
                if entry.name in entries:
                    raise InvalidCalibration(f"{entry.name!r} is in {self._name} twice")
                entries[entry.name], places[entry.name] = entry, (group, at)
        return entries, places

    def _entry(self, row: dict[str, Any]) -> Entry:
        name, dtype, shape = row["name"], row["dtype"], row["shape"]
        if name is None or dtype is None or shape is None or any(size is None or size < 0 for size in shape):
            raise InvalidCalibration(f"row {name!r} of {self._name} has not `name`, `dtype` and `shape`")
        if math.prod(size or 1 for size in shape) > 1 << 59:
            raise InvalidCalibration(f"{name!r} in {self._name} has the shape {shape[:8]}, of too many elements")
        return checked_entry(name, dtype, tuple(shape), str(self._name))
