"""Small tensors in Arrow tables, a row each: quantize, dequantize and compare them in one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from service.engine.backends.base import Backend, Grid
from service.engine.config import TensorConfig, build
from service.engine.methods.base import Method
from service.engine.methods.registry import methods
from service.engine.metrics import ErrorSums, Quality
from service.engine.packing import pack_flat, pack_rows, unpack_flat, unpack_rows
from service.engine.progress import Cancelled
from service.engine.publish import stop_when
from service.engine.schemes.base import Scheme
from service.engine.stored_tensors import StoredTensor, stored_tensors
from service.engine.table_io import (
    check_columns,
    float_lists,
    matrix_shape,
    shapes,
    text_column,
)
from service.engine.tensors import FLOAT_DTYPES, Array, QuantizedRows
from service.errors import InvalidTable, NonFiniteWeights

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
#: `zero_points` (null where the scheme is symmetric; one byte each) go row by row, group by group.
QUANTIZED = pa.schema(
    [
        *_PARTS,
        ("zero_points", pa.large_binary()),
        ("group_size", pa.int32()),
        ("bit_width", pa.int32()),
        ("dtype", pa.string()),
        ("bits_per_weight", pa.float64()),
        *_FIGURES,
    ]
)
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
    method = methods()[config.method or "minmax"]()
    rows = [_quantize(name, x, shape, config, method, tools) for name, x, shape in _tensors(table)]
    return pa.Table.from_pylist(rows, schema=QUANTIZED)


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
    weights = [_dequantize(t, tools) for t in stored]
    offsets = np.cumsum([0, *(w.size for w in weights)], dtype=np.int64)
    values = np.concatenate(weights) if weights else np.empty(0, np.float32)
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


def _quantize(
    name: str, x: Array, shape: tuple[int, ...], config: TensorConfig, method: Method, tools: Tools
) -> dict[str, Any]:
    dtype = _DTYPE_NAMES[x.dtype]
    scheme = build(config, dtype)
    pieces = list(_quantized_blocks(name, x.reshape(matrix_shape(shape)), scheme, method, tools)) if x.size else []
    codes = [unpack_rows(p.packed, scheme.bits, p.cols) for p in pieces]
    grids = pieces[:1] if scheme.granularity == "tensor" else pieces
    data = pack_flat(np.concatenate(codes), scheme.bits) if codes else b""
    scales = b"".join(p.scale.tobytes() for p in grids)
    zeros = None if scheme.symmetric else b"".join(p.zero_point.tobytes() for p in grids if p.zero_point is not None)
    quality = Quality.of(sum((p.errors for p in pieces), ErrorSums()), len(data) + len(scales) + len(zeros or b""))
    return {
        "layer_name": name,
        "shape": list(shape),
        "quant_type": scheme.id,
        "granularity": scheme.granularity,
        "scale_dtype": scheme.scale_dtype,
        "data": data,
        "scales": scales,
        "zero_points": zeros,
        "group_size": scheme.group_size if scheme.granularity == "group" else None,
        "bit_width": scheme.bits,
        "dtype": dtype,
        "bits_per_weight": quality.bits_per_weight,
    } | _figures(quality)


def _quantized_blocks(name: str, x: Array, scheme: Scheme, method: Method, tools: Tools) -> Iterator[QuantizedRows]:
    grid = _tensor_grid(name, x, scheme, method, tools) if scheme.granularity == "tensor" else None
    for block in _blocks(x, tools):
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


def _blocks(x: npt.NDArray[S], tools: Tools) -> Iterator[npt.NDArray[S]]:
    rows, cols = x.shape
    # Counted as float64, so that two arrays of different dtypes are cut alike.
    step = max(1, tools.block_bytes // (8 * max(1, cols)))
    for start in range(0, rows, step):
        stop_when(tools.cancelled)
        yield x[start : start + step]


def _dequantize(stored: StoredTensor, tools: Tools) -> Array:
    rows, cols = matrix_shape(stored.shape)
    out = np.empty(rows * cols, np.float32)
    if not out.size:
        return out
    scheme, per_tensor = stored.scheme, stored.scheme.granularity == "tensor"
    codes = unpack_flat(stored.data, scheme.bits, rows * cols).reshape(rows, cols)
    start = 0
    for block in _blocks(codes, tools):
        part = slice(0, 1) if per_tensor else slice(start, start + len(block))
        zeros = None if stored.zero_points is None else stored.zero_points[part]
        packed = pack_rows(block, scheme.bits)
        q = QuantizedRows(scheme, cols, packed, stored.scales[part], zeros, ErrorSums())
        out[start * cols : (start + len(block)) * cols] = tools.backend.dequantize(q).reshape(-1)
        start += len(block)
    return out


def _figures(quality: Quality) -> dict[str, float | None]:
    return {name: getattr(quality, name) for name, _ in _FIGURES}


def _non_finite(name: str) -> NonFiniteWeights:
    return NonFiniteWeights(f"layer {name!r} holds a NaN or an infinity; mend it, or leave it out", tensor=name)
