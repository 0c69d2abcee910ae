"""Small tensors in Arrow tables, a row each: quantize, dequantize and compare them in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from service.engine.backends.base import Backend, Grid
from service.engine.choice import choose_method
from service.engine.config import TensorConfig, build
from service.engine.methods.base import Method
from service.engine.metrics import ErrorSums, Quality
from service.engine.packing import WORD_BITS, pack_flat, pack_rows, row_bytes, unpack_flat, unpack_rows
from service.engine.progress import Cancelled
from service.engine.publish import stop_when
from service.engine.schemes.base import TENSOR_SCALE_BYTES, Scheme
from service.engine.stored_tensors import StoredTensor, stored_tensors
from service.engine.table_io import (
    check_columns,
    float_lists,
    matrix_shape,
    shapes,
    text_column,
)
from service.engine.tensors import FLOAT_DTYPES, Array, CodeArray, FloatArray, QuantizedRows
from service.errors import InvalidConfig, InvalidTable, NonFiniteWeights

_FIGURES: list[tuple[str, Any]] = [
    ("cosine_similarity", pa.float64()),
    ("sqnr_db", pa.float64()),
    ("relative_error", pa.float64()),
    ("max_abs_error", pa.float64()),
]
_PARTS: list[tuple[str, Any]] = [
    ("layer_name", pa.string()),
    ("shape", pa.list_(pa.int64())),
    ("quant_type", pa.string()),
    ("granularity", pa.string()),
    ("scale_dtype", pa.string()),
    ("data", pa.large_binary()),
    ("scales", pa.large_binary()),
]
#: One row per tensor. `data` is the codes as one little-endian bit stream, row by row; `scales` and
#: `zero_points` (null where the scheme is symmetric; one byte each) go row by row, group by group; `tensor_scale`
#: is what scales are to be divided by, null where the scheme has none.
QUANTIZED = pa.schema(
    [
        *_PARTS,
        ("zero_points", pa.large_binary()),
        ("group_size", pa.int32()),
        ("tensor_scale", pa.float32()),
        ("bit_width", pa.int32()),
        ("dtype", pa.string()),
        ("bits_per_weight", pa.float64()),
        *_FIGURES,
    ]
)
_BINARY = ("data", "scales", "zero_points")
_PLAIN = pa.schema([field for field in QUANTIZED if field.name not in _BINARY])
WEIGHTS = pa.schema(
    [("layer_name", pa.string()), ("weights", pa.large_list(pa.float32())), ("shape", pa.list_(pa.int64()))]
)
COMPARED = pa.schema([("layer_name", pa.string()), ("count", pa.int64()), *_FIGURES])

S = TypeVar("S", bound=np.generic)
_DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Tools:
    """What every call uses. Rows are computed in blocks of `block_bytes`, `cancelled` asked between them."""

    backend: Backend
    block_bytes: int
    cancelled: Cancelled


def quantize_table(table: pa.Table, config: TensorConfig, tools: Tools) -> pa.Table:
    """Quantize every row of (layer_name, weights, optional shape); the answer has the schema QUANTIZED.

    `config` is resolved. Raises InvalidTable or NonFiniteWeights.
    """
    check_columns(table, ("layer_name", "weights"), ("shape",))
    method = choose_method(config.method or "minmax", None).method
    if method.low_rank:
        detail = f"the answer has no columns for the low-rank part of method {method.id!r}: choose another"
        raise InvalidConfig(detail, pointer="/method")
    coded = [_quantize(name, x, shape, config, method, tools) for name, x, shape in _tensors(table)]
    columns = dict(zip(_PLAIN.names, pa.Table.from_pylist([c.row for c in coded], _PLAIN).columns, strict=True))
    columns |= {name: _binaries([c.parts[name] for c in coded]) for name in _BINARY}
    return pa.Table.from_arrays([columns[name] for name in QUANTIZED.names], schema=QUANTIZED)


def dequantize_table(table: pa.Table, tools: Tools, max_bytes: int) -> pa.Table:
    """The inverse of `quantize_table`; the answer has the schema WEIGHTS, in float32.

    Raises InvalidTable, also where the answer would have more than `max_bytes`.
    """
    required = [name for name, _ in _PARTS]
    check_columns(table, required, [name for name in QUANTIZED.names if name not in required])
    stored = list(stored_tensors(table))
    size = sum(4 * t.count for t in stored)
    if size > max_bytes:
        raise InvalidTable(f"the weights would take {size} bytes, more than {max_bytes}: split the table")
    offsets = np.cumsum([0, *(t.count for t in stored)], dtype=np.int64)
    values = np.empty(offsets[-1], np.float32)
    for t, start, stop in zip(stored, offsets[:-1], offsets[1:], strict=True):
        _dequantize(t, tools, values[start:stop])
    columns = [
        pa.array([t.name for t in stored], pa.string()),
        pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, pa.float32())),
        pa.array([list(t.shape) for t in stored], pa.list_(pa.int64())),
    ]
    return pa.Table.from_arrays(columns, schema=WEIGHTS)


def compare_table(table: pa.Table, tools: Tools) -> pa.Table:
    """How far `other` is from `weights` in every row; the answer has the schema COMPARED."""
    check_columns(table, ("layer_name", "weights", "other"))
    rows = []
    pairs = zip(float_lists(table, "weights"), float_lists(table, "other"), strict=True)
    for row, (name, (x, y)) in enumerate(zip(text_column(table, "layer_name"), pairs, strict=True)):
        if x.size != y.size:
            raise InvalidTable(f"row {row} ({name}): 'weights' has {x.size} elements and 'other' {y.size}")
        sums = _compare(name, x, y, tools)
        rows.append({"layer_name": name, "count": x.size} | _figures(Quality.of(sums, 0)))
    return pa.Table.from_pylist(rows, schema=COMPARED)


def _tensors(table: pa.Table) -> Iterator[tuple[str, Array, tuple[int, ...]]]:
    columns = zip(text_column(table, "layer_name"), float_lists(table, "weights"), shapes(table), strict=True)
    for row, (name, x, given) in enumerate(columns):
        shape = (x.size,) if given is None else given
        rows, cols = matrix_shape(shape)
        if rows * cols != x.size:
            raise InvalidTable(f"row {row} ({name}): 'shape' is {list(shape)}, but 'weights' has {x.size} elements")
        yield name, x, shape


@dataclass(frozen=True, slots=True)
class _Coded:
    """A row of the answer: what is small, and of the binary columns the arrays as the backend made them, or None."""

    row: dict[str, Any]
    parts: dict[str, Sequence[Array] | None]


def _quantize(
    name: str, x: Array, shape: tuple[int, ...], config: TensorConfig, method: Method, tools: Tools
) -> _Coded:
    dtype = _DTYPE_NAMES[x.dtype]
    scheme = build(config, dtype)
    pieces = list(_quantized_blocks(name, x.reshape(matrix_shape(shape)), scheme, method, tools)) if x.size else []
    grids = pieces[:1] if scheme.granularity == "tensor" else pieces
    tensor_scale = pieces[0].tensor_scale if pieces else None
    data, scales = _stream(pieces), [p.scale for p in grids]
    zeros = None if scheme.symmetric else [p.zero_point for p in grids if p.zero_point is not None]
    nbytes = sum(part.nbytes for part in (*data, *scales, *(zeros or ())))
    nbytes += TENSOR_SCALE_BYTES * scheme.has_tensor_scale
    quality = Quality.of(sum((p.errors for p in pieces), ErrorSums()), nbytes)
    row = {
        "layer_name": name,
        "shape": list(shape),
        "quant_type": scheme.id,
        "granularity": scheme.granularity,
        "scale_dtype": scheme.scale_dtype,
        "group_size": scheme.group_size if scheme.granularity == "group" else None,
        "tensor_scale": 1.0 if scheme.has_tensor_scale and tensor_scale is None else tensor_scale,
        "bit_width": scheme.bits,
        "dtype": dtype,
        "bits_per_weight": quality.bits_per_weight,
    } | _figures(quality)
    return _Coded(row, {"data": data, "scales": scales, "zero_points": zeros})


def _stream(pieces: Sequence[QuantizedRows]) -> list[Array]:
    """The codes of a tensor as one bit stream: of rows that fill their words, the packed rows as they are."""
    if all(p.cols * p.scheme.bits % WORD_BITS == 0 for p in pieces):
        return [p.packed for p in pieces]
    bits = pieces[0].scheme.bits
    codes = np.concatenate([unpack_rows(p.packed, bits, p.cols) for p in pieces])
    return [np.frombuffer(pack_flat(codes, bits), np.uint8)]


def _binaries(rows: Sequence[Sequence[Array] | None]) -> Any:
    """A column of bytes, each value put together from arrays: copied once, to where Arrow wants them beside each other.

    A value is None in all rows or in none.
    """
    given = [row for row in rows if row is not None]
    if len(given) < len(rows):
        return pa.nulls(len(rows), pa.large_binary())
    offsets = np.fromiter(accumulate((sum(part.nbytes for part in row) for row in given), initial=0), np.int64)
    parts = [part.reshape(-1).view(np.uint8) for part in chain.from_iterable(given)]
    values = np.concatenate(parts) if parts else np.empty(0, np.uint8)
    buffers = [None, pa.py_buffer(offsets.data), pa.py_buffer(values.data)]
    return pa.Array.from_buffers(pa.large_binary(), len(rows), buffers, null_count=0)


def _quantized_blocks(name: str, x: Array, scheme: Scheme, method: Method, tools: Tools) -> Iterator[QuantizedRows]:
    grid = _tensor_grid(name, x, scheme, method, tools) if scheme.takes_pass else None
    for block in _blocks(x, tools, _multiple(scheme)):
        piece = tools.backend.quantize(block, scheme, method, grid)
        if not piece.errors.finite:
            raise _non_finite(name)
        yield piece


def _tensor_grid(name: str, x: Array, scheme: Scheme, method: Method, tools: Tools) -> Grid:
    seen = [tools.backend.observe(block) for block in _blocks(x, tools)]
    whole = sum(seen[1:], seen[0])
    if not whole.finite:
        raise _non_finite(name)
    return tools.backend.tensor_grid(whole, scheme, method)


def _compare(name: str, x: Array, y: Array, tools: Tools) -> ErrorSums:
    pairs = zip(_blocks(x[:, None], tools), _blocks(y[:, None], tools), strict=True)
    sums = sum((tools.backend.compare(a, b) for a, b in pairs), ErrorSums())
    if not sums.finite:
        raise _non_finite(name)
    return sums


def _multiple(scheme: Scheme) -> int:
    return scheme.row_multiple if scheme.granularity == "block" else 1


def _blocks(x: npt.NDArray[S], tools: Tools, multiple: int = 1) -> Iterator[npt.NDArray[S]]:
    yield from (x[part] for part in _parts(len(x), x.shape[1], tools, multiple))


def _parts(rows: int, cols: int, tools: Tools, multiple: int = 1) -> Iterator[slice]:
    """Rows to work on one after the other, a multiple of some; raises Cancelled between them when that is asked."""
    # Counted as float64, so that two arrays of different dtypes are cut alike.
    step = max(1, tools.block_bytes // (8 * max(1, cols)) // multiple) * multiple
    for start in range(0, rows, step):
        stop_when(tools.cancelled)
        yield slice(start, start + step)


def _dequantize(stored: StoredTensor, tools: Tools, out: FloatArray) -> None:
    rows, cols = matrix_shape(stored.shape)
    if not out.size:
        return
    scheme, per_tensor = stored.scheme, stored.scheme.granularity == "tensor"
    packed, weights = _packed_rows(stored, rows, cols), out.reshape(rows, cols)
    for part in _parts(rows, cols, tools, _multiple(scheme)):
        grid = slice(0, 1) if per_tensor else slice(*(scheme.scale_rows(row) for row in (part.start, part.stop)))
        zeros = None if stored.zero_points is None else stored.zero_points[grid]
        scales = stored.scales[grid]
        q = QuantizedRows(scheme, cols, packed[part], scales, zeros, ErrorSums(), stored.tensor_scale)
        weights[part] = tools.backend.dequantize(q)


def _packed_rows(stored: StoredTensor, rows: int, cols: int) -> CodeArray:
    """The inverse of `_stream`."""
    bits = stored.scheme.bits
    if cols * bits % WORD_BITS == 0:
        return np.frombuffer(stored.data, np.uint8).reshape(rows, row_bytes(cols, bits))
    return pack_rows(unpack_flat(stored.data, bits, rows * cols).reshape(rows, cols), bits)


def _figures(quality: Quality) -> dict[str, float | None]:
    return {name: getattr(quality, name) for name, _ in _FIGURES}


def _non_finite(name: str) -> NonFiniteWeights:
    return NonFiniteWeights(f"layer {name!r} holds a NaN or an infinity; mend it, or leave it out", tensor=name)
