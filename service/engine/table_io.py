"""Arrow tables from strangers: read with care, columns checked, written as IPC streams.

Nothing is believed before it is checked: buffers are validated in full, and compressed streams
are refused, because a few bytes of them can stand for all the memory there is.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from service.engine.tensors import Array
from service.errors import InvalidTable

#: Positions in the tables of Arrow's Message.fbs.
_MESSAGE_HEADER, _BATCH_COMPRESSION = 2, 3
_FLOATS = (pa.float16(), pa.float32(), pa.float64())


def read_table(data: bytes | memoryview) -> pa.Table:
    """The table of an Arrow IPC stream, in one chunk; raises InvalidTable."""
    try:
        _refuse_compression(data)
        with pa.ipc.open_stream(pa.py_buffer(data)) as stream:
            table = stream.read_all()
        table.validate(full=True)
        if table.num_rows > len(data):  # rows of nothing, or of lists of no elements, take no bytes at all
            raise InvalidTable(f"the table claims {table.num_rows} rows, more than it has bytes")
        return table.combine_chunks()
    except (pa.ArrowException, OSError, struct.error, UnicodeDecodeError) as error:
        raise InvalidTable(f"the body is not an Arrow IPC stream: {error}") from error


def write_table(table: pa.Table) -> memoryview:
    """The table as an Arrow IPC stream."""
    # Measured first: a buffer that grows is copied again and again.
    counted = pa.MockOutputStream()
    _write(table, counted)
    buffer = pa.allocate_buffer(counted.size())
    _write(table, pa.FixedSizeBufferWriter(buffer))
    return memoryview(buffer)


def _write(table: pa.Table, sink: Any) -> None:
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def check_columns(table: pa.Table, required: Collection[str], optional: Collection[str] = ()) -> None:
    """Raise InvalidTable unless the table has these columns, each once, and no others."""
    counts = Counter(table.column_names)
    takes = ", ".join([*required, *(f"{name} (may be left out)" for name in optional)])
    for name in required:
        if name not in counts:
            raise InvalidTable(f"column {name!r} is missing; this call takes {takes}")
    for name, count in counts.items():
        if name not in required and name not in optional:
            raise InvalidTable(f"column {name!r} is not known; this call takes {takes}")
        if count > 1:
            raise InvalidTable(f"column {name!r} is there {count} times")


def text_column(table: pa.Table, name: str) -> list[str]:
    """A column of text, without nulls."""
    type_: Any = table.field(name).type
    if not (pa.types.is_string(type_) or pa.types.is_large_string(type_)):
        raise _wrong_type(name, type_, "utf8")
    array = _array(table, name)
    _refuse_nulls(name, array)
    return [str(value) for value in array.to_pylist()]


def float_lists(table: pa.Table, name: str) -> list[Array]:
    """A column of lists of floats: for each row its values, views of float16, float32 or float64."""
    type_: Any = table.field(name).type
    if not _is_list(type_) or type_.value_type not in _FLOATS:
        raise _wrong_type(name, type_, "a list of float16, float32 or float64")
    offsets, values = _list_parts(name, _array(table, name))
    numbers = values.to_numpy(zero_copy_only=True)
    return [numbers[start:stop] for start, stop in pairwise(offsets)]


def shapes(table: pa.Table, name: str = "shape") -> list[tuple[int, ...] | None]:
    """A column of lists of sizes, None where the row has none; all None where there is no such column."""
    if name not in table.column_names:
        return [None] * table.num_rows
    type_: Any = table.field(name).type
    if not _is_list(type_) or not pa.types.is_integer(type_.value_type):
        raise _wrong_type(name, type_, "a list of integers")
    return [_shape(name, row, sizes) for row, sizes in enumerate(_array(table, name).to_pylist())]


def optional_integers(table: pa.Table, name: str) -> list[int | None]:
    """A column of integers with nulls; all None where there is no such column."""
    if name not in table.column_names:
        return [None] * table.num_rows
    type_: Any = table.field(name).type
    if not pa.types.is_integer(type_):
        raise _wrong_type(name, type_, "integers")
    found: list[int | None] = _array(table, name).to_pylist()
    return found


def optional_floats(table: pa.Table, name: str) -> list[float | None]:
    """A column of floats with nulls; all None where there is no such column."""
    if name not in table.column_names:
        return [None] * table.num_rows
    type_: Any = table.field(name).type
    if type_ not in _FLOATS:
        raise _wrong_type(name, type_, "float16, float32 or float64")
    found: list[float | None] = _array(table, name).to_pylist()
    return found


def binaries(table: pa.Table, name: str) -> list[memoryview | None]:
    """A column of bytes with nulls, as views; all None where there is no such column."""
    if name not in table.column_names:
        return [None] * table.num_rows
    type_: Any = table.field(name).type
    if not (pa.types.is_binary(type_) or pa.types.is_large_binary(type_)):
        raise _wrong_type(name, type_, "binary")
    return [memoryview(value.as_buffer()) if value.is_valid else None for value in _array(table, name)]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor; one with fewer than two dimensions is a single row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _array(table: pa.Table, name: str) -> Any:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [_nothing(column.type)])


def _nothing(type_: pa.DataType) -> Any:
    return pa.array([], type_)


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _list_parts(name: str, array: Any) -> tuple[list[int], Any]:
    """Where the rows of a list array begin in its values, with the end of the last one; no nulls anywhere."""
    _refuse_nulls(name, array)
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        offsets, values = [size * row for row in range(len(array) + 1)], array.flatten()
    else:
        offsets, values = array.offsets.to_pylist(), array.values
    if values.null_count:
        index = int(np.argmin(values.is_valid().to_numpy(zero_copy_only=False)))
        row = int(np.searchsorted(np.array(offsets), index, side="right")) - 1
        raise InvalidTable(f"column {name!r}, row {row}: element {index - offsets[max(row, 0)]} is null")
    return offsets, values


def _refuse_nulls(name: str, array: Any) -> None:
    if array.null_count:
        row = int(np.argmin(array.is_valid().to_numpy(zero_copy_only=False)))
        raise InvalidTable(f"column {name!r}, row {row}: is null")


def _shape(name: str, row: int, sizes: list[int | None] | None) -> tuple[int, ...] | None:
    if sizes is None:
        return None
    if any(size is None or size < 0 for size in sizes):
        raise InvalidTable(f"column {name!r}, row {row}: {sizes} is not a shape")
    return tuple(int(size) for size in sizes if size is not None)


def _wrong_type(name: str, type_: pa.DataType, expected: str) -> InvalidTable:
    return InvalidTable(f"column {name!r} has the type {type_}; it takes {expected}")


def _refuse_compression(data: bytes | memoryview) -> None:
    for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(data)):
        if message.type == "dictionary":
            raise InvalidTable("a column is dictionary-encoded; send it plain")
        if message.type == "record batch" and _is_compressed(memoryview(message.metadata)):
            raise InvalidTable("the stream is compressed; send it uncompressed")


def _is_compressed(metadata: memoryview) -> bool:
    """Whether a record batch's flatbuffer has its `compression` field set."""
    (message,) = struct.unpack_from("<I", metadata, 0)
    header = _field(metadata, message, _MESSAGE_HEADER)
    if header is None:
        return False
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return _field(metadata, batch, _BATCH_COMPRESSION) is not None


def _field(buffer: memoryview, table: int, index: int) -> int | None:
    """Where the field of a flatbuffer table lies, None where it is not set."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    (size,) = struct.unpack_from("<H", buffer, vtable)
    slot = 4 + 2 * index
    offset = struct.unpack_from("<H", buffer, vtable + slot)[0] if slot < size else 0
    return table + offset if offset else None
