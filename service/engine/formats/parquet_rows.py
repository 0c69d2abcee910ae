"""The rows of a Parquet file: what is kept of each until its row group is complete."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from service.engine.formats.parquet_schema import BYTE_COLUMNS, SCHEMA

#: The columns that Arrow encodes.
CELLS = pa.schema([field for field in SCHEMA if field.name not in BYTE_COLUMNS])


@dataclass(slots=True)
class Row:
    """A row without its bytes; `cells` are those of its tensor, which its other rows share."""

    cells: dict[str, Any]
    index: int
    offset: int  # in elements of the tensor
    sizes: list[int]  # bytes of each of BYTE_COLUMNS
    sha256: str = ""

    def as_json(self) -> list[Any]:
        """What a row has to itself, for `of`."""
        return [self.index, self.offset, self.sizes, self.sha256]

    @classmethod
    def of(cls, cells: dict[str, Any], value: list[Any]) -> Row:
        """The inverse of `as_json`."""
        return cls(cells, *value)

    def has(self, column: int) -> bool:
        """Whether its cell of BYTE_COLUMNS holds something, be it empty, rather than null."""
        if BYTE_COLUMNS[column] == "data":
            return True
        if BYTE_COLUMNS[column] == "scales":
            return "scale_dtype" in self.cells
        if BYTE_COLUMNS[column] == "zero_points":
            return self.cells.get("symmetric") is False
        return "low_rank" in self.cells and (BYTE_COLUMNS[column] == "low_rank_up" or self.index == 0)


def batch_of(rows: Sequence[Row], shared: dict[str, Any]) -> pa.RecordBatch:
    """All columns of these rows but the bytes; `shared` are cells that all rows of the model have."""
    cells = [
        shared | row.cells | {"chunk_index": row.index, "chunk_offset": row.offset, "sha256": row.sha256}
        for row in rows
    ]
    return pa.record_batch([pa.array([c.get(f.name) for c in cells], f.type) for f in CELLS], schema=CELLS)


def read_cells(path: Path, group: int) -> dict[str, pa.ChunkedArray[Any]]:
    """BYTE_COLUMNS of a row group of an own file; OSError when it is not as it should be."""
    try:
        with pq.ParquetFile(path) as file:
            table = file.read_row_group(group, columns=list(BYTE_COLUMNS))
    except (pa.ArrowException, IndexError) as error:
        raise OSError(errno.EIO, "a finished file is damaged") from error
    return {name: table[name] for name in BYTE_COLUMNS}
