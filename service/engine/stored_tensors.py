"""Quantized tensors as rows of a table: looked at before anything is computed from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from service.engine.schemes.base import Scheme
from service.engine.schemes.registry import build_scheme, schemes
from service.engine.table_io import binaries, matrix_shape, optional_floats, optional_integers, shapes, text_column
from service.engine.tensors import Array, CodeArray
from service.errors import InvalidTable


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A row of a quantized table, its lengths checked."""

    name: str
    shape: tuple[int, ...]
    scheme: Scheme
    data: memoryview
    scales: Array  # as in `QuantizedRows`, like the two after it
    zero_points: CodeArray | None
    tensor_scale: np.float32 | None

    @property
    def count(self) -> int:
        """Number of weights."""
        rows, cols = matrix_shape(self.shape)
        return rows * cols


def stored_tensors(table: pa.Table) -> Iterator[StoredTensor]:
    """Every row of a quantized table; raises InvalidTable naming the row that contradicts itself."""
    texts = [text_column(table, name) for name in ("layer_name", "quant_type", "granularity", "scale_dtype")]
    parts = [binaries(table, name) for name in ("data", "scales", "zero_points")]
    sizes = (
        shapes(table),
        optional_integers(table, "group_size"),
        optional_integers(table, "bit_width"),
        optional_floats(table, "tensor_scale"),
    )
    for row, (text, part, size) in enumerate(
        zip(zip(*texts, strict=True), zip(*parts, strict=True), zip(*sizes, strict=True), strict=True)
    ):
        name, quant_type, granularity, scale_dtype = text
        shape, group_size, bit_width, tensor_scale = size
        where = f"row {row} ({name})"
        if shape is None:
            raise InvalidTable(f"{where}: 'shape' is null")
        scheme = _scheme(where, quant_type, granularity, scale_dtype, group_size, part[2] is None)
        if bit_width not in (None, scheme.bits):
            raise InvalidTable(f"{where}: 'bit_width' is {bit_width}, but {quant_type} has {scheme.bits}")
        if scheme.has_tensor_scale and (tensor_scale is None or not 0 < tensor_scale < math.inf):
            raise InvalidTable(f"{where}: 'tensor_scale' is {tensor_scale}, and {quant_type} has one")
        yield _stored(where, name, shape, scheme, part, tensor_scale)


def _scheme(
    where: str, quant_type: str, granularity: str, scale_dtype: str, group_size: int | None, symmetric: bool
) -> Scheme:
    if quant_type not in schemes():
        raise InvalidTable(f"{where}: 'quant_type' is {quant_type!r}; there are {', '.join(schemes())}")
    if granularity == "group" and group_size is None:
        raise InvalidTable(f"{where}: 'group_size' is null, and the granularity is group")
    parameters = {"granularity": granularity, "group_size": group_size, "scale_dtype": scale_dtype}
    try:
        return build_scheme(quant_type, symmetric=symmetric, **parameters)
    except ValueError as error:
        raise InvalidTable(f"{where}: {parameters} do not make a scheme of {quant_type}") from error


def _stored(
    where: str,
    name: str,
    shape: tuple[int, ...],
    scheme: Scheme,
    parts: tuple[memoryview | None, ...],
    tensor_scale: float | None,
) -> StoredTensor:
    rows, cols = matrix_shape(shape)
    data, scales, zeros = parts
    times = scheme.scale_rows(rows) if rows * cols else 0
    scale_bytes, zero_bytes = (times * nbytes for nbytes in scheme.grid_bytes(cols)) if times else (0, 0)
    expected = {"data": -(-rows * cols * scheme.bits // 8), "scales": scale_bytes, "zero_points": zero_bytes}
    for column, part in (("data", data), ("scales", scales), ("zero_points", zeros)):
        if part is None and column != "zero_points":
            raise InvalidTable(f"{where}: {column!r} is null")
        if part is not None and len(part) != expected[column]:
            raise InvalidTable(f"{where}: {column!r} has {len(part)} bytes; {list(shape)} takes {expected[column]}")
    assert data is not None
    assert scales is not None
    over = np.float32(tensor_scale) if scheme.has_tensor_scale else None
    if not times:
        return StoredTensor(name, shape, scheme, data, np.empty((0, 0), np.float32), None, over)
    return StoredTensor(name, shape, scheme, data, *scheme.grid_arrays(scales, zeros, cols), over)
