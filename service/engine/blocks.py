"""Rows of a tensor that are worked on together."""

from __future__ import annotations

from collections.abc import Iterator

from service.engine.schemes.base import ROW_MULTIPLE
from service.engine.tensors import TensorInfo


def row_blocks(info: TensorInfo, block_bytes: int, multiple: int = ROW_MULTIPLE) -> Iterator[tuple[int, int]]:
    """(start, stop) of row blocks of about `block_bytes` of source, each but the last of a multiple of some rows."""
    return row_spans(info.rows, info.nbytes, block_bytes, multiple)


def row_spans(rows: int, nbytes: int, span_bytes: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Likewise, of so many rows and bytes."""
    row_bytes = max(1, nbytes // max(1, rows))
    step = max(1, span_bytes // row_bytes // multiple) * multiple
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
