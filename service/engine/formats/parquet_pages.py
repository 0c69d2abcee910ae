"""What stands around the values in a Parquet file: heads of pages, and the metadata of columns, groups and files.

The bytes of large cells are written where they stay, as plain pages without Arrow's help, which would copy them three
times; all other columns are encoded by Arrow, whose pages are taken over as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq

from service.engine.formats.parquet_guard import MAGIC, TAIL_BYTES
from service.engine.formats.thrift import BINARY, I32, STRUCT, CompactReader, Struct
from service.engine.formats.thrift_encode import Encoded, binary, i32, i64, list_of, struct, varint

#: Before the bytes of a cell: how many they are.
PREFIX_BYTES = 4
#: A page says in 32 bits how long it is.
MAX_CELL_BYTES = (1 << 31) - 64
#: Statistics of the others would hold whole cells.
STATISTICS = ["layer_name", "dtype", "quant_type", "packing", "scale_dtype", "modality", "chunk_index"]

# Numbers in parquet.thrift.
_BYTE_ARRAY = 6
_DATA_PAGE = 0
_PLAIN, _RLE = 0, 3
_UNCOMPRESSED = 0
_ROW_COUNT, _ROW_GROUPS = 3, 4
_TYPE, _PATH, _VALUES, _NBYTES, _OFFSET, _STATISTICS = 1, 3, 5, 7, 9, 12
_NULLS, _LARGEST, _SMALLEST = 3, 5, 6


@dataclass(frozen=True, slots=True)
class Column:
    """The pages of one column in a row group: where they are, and what there is to say of them."""

    path: tuple[bytes, ...]
    offset: int
    nbytes: int
    values: int
    type: int = _BYTE_ARRAY
    statistics: Struct = field(default_factory=dict)

    def encoded(self) -> Encoded:
        """As a `ColumnChunk` of the footer."""
        fields = {
            1: i32(self.type),
            2: list_of(I32, [i32(_PLAIN), i32(_RLE)]),
            3: list_of(BINARY, [binary(part) for part in self.path]),
            4: i32(_UNCOMPRESSED),
            5: i64(self.values),
            6: i64(self.nbytes),
            7: i64(self.nbytes),
            9: i64(self.offset),
        }
        if self.statistics:
            fields[_STATISTICS] = _encoded_statistics(self.statistics)
        return struct({2: i64(0), 3: struct(fields)})


def prefix(nbytes: int) -> bytes:
    """What stands before the bytes of a cell."""
    return nbytes.to_bytes(PREFIX_BYTES, "little")


def page_head(present: Sequence[bool], nbytes: int) -> bytes:
    """What stands before a page's cells: which of them are null, and how many bytes the others take with prefixes."""
    runs = b"".join(_run(len(list(same)), there) for there, same in groupby(present))
    levels = prefix(len(runs)) + runs
    size = i32(len(levels) + nbytes)
    about = struct({1: i32(len(present)), 2: i32(_PLAIN), 3: i32(_RLE), 4: i32(_RLE)})
    return struct({1: i32(_DATA_PAGE), 2: size, 3: size, 5: about}).data + levels


def encode_columns(batch: pa.RecordBatch) -> tuple[memoryview, list[Column]]:
    """Arrow's pages of these columns, and where they begin in there."""
    file, footer = _written(batch.schema, batch)
    (group,) = CompactReader(footer).struct()[_ROW_GROUPS]
    pages = file[len(MAGIC) : len(file) - len(footer) - TAIL_BYTES]
    return pages, [_column(chunk[3]) for chunk in group[1]]


def moved(columns: Iterable[Column], offset: int) -> list[Column]:
    """Columns as they are when the pages that they are in come to lie at this offset."""
    return [replace(column, offset=column.offset + offset) for column in columns]


def encode_group(columns: Sequence[Column], rows: int, start: int) -> bytes:
    """A row group for the footer, its columns in the order of the schema; `start` is where its pages begin."""
    nbytes = i64(sum(column.nbytes for column in columns))
    chunks = list_of(STRUCT, [column.encoded() for column in columns])
    return struct({1: chunks, 2: nbytes, 3: i64(rows), 5: i64(start), 6: nbytes}).data


def encode_schema(schema: pa.Schema) -> dict[int, Encoded]:
    """The footer of a file without rows, for `encode_footer`: schema and metadata as Arrow writes them."""
    _, footer = _written(schema, None)
    return {number: Encoded(*raw) for number, raw in CompactReader(footer).raw_fields().items()}


def encode_footer(schema: Mapping[int, Encoded], groups: Sequence[bytes], rows: int) -> bytes:
    """The end of a file with these row groups."""
    fields = dict(schema)
    fields[_ROW_COUNT] = i64(rows)
    fields[_ROW_GROUPS] = list_of(STRUCT, [Encoded(STRUCT, group) for group in groups])
    data = struct(fields).data
    return data + prefix(len(data)) + MAGIC


def _run(count: int, present: bool) -> bytes:
    """So many cells that are there, or null."""
    return varint(count << 1) + bytes([present])


def _written(schema: pa.Schema, batch: pa.RecordBatch | None) -> tuple[memoryview, bytes]:
    """A file of one row group, or none, and its footer."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema,
        compression="none",
        use_dictionary=False,
        write_statistics=STATISTICS,
        version="2.6",
        store_schema=batch is None,
    ) as writer:
        if batch is not None:
            writer.write_batch(batch, row_group_size=batch.num_rows)
    file = memoryview(sink.getvalue())
    size = int.from_bytes(file[-TAIL_BYTES : -len(MAGIC)], "little")
    return file, bytes(file[-TAIL_BYTES - size : -TAIL_BYTES])


def _column(meta: Struct) -> Column:
    """What Arrow wrote, counted from where its pages begin."""
    return Column(
        path=tuple(meta[_PATH]),
        offset=meta[_OFFSET] - len(MAGIC),
        nbytes=meta[_NBYTES],
        values=meta[_VALUES],
        type=meta[_TYPE],
        statistics=meta.get(_STATISTICS, {}),
    )


def _encoded_statistics(found: Mapping[int, object]) -> Encoded:
    fields: dict[int, Encoded] = {}
    for number in (_NULLS, _LARGEST, _SMALLEST):
        value = found.get(number)
        if isinstance(value, int):
            fields[number] = i64(value)
        elif isinstance(value, bytes):
            fields[number] = binary(value)
    return struct(fields)
