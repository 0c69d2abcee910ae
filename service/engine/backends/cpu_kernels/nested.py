"""Nested schemes on the CPU: what is found group by group in kernels, and what rows share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.engine.backends.cpu_kernels import nested_rows, nested_search, rows
from service.engine.backends.cpu_kernels.codes import SUMS
from service.engine.backends.cpu_kernels.vector import LANES
from service.engine.methods.mse import Mse
from service.engine.packing import row_bytes
from service.engine.schemes.base import SCALE_DTYPES
from service.engine.schemes.nested import SPREADS, NestedScheme
from service.engine.tensors import CodeArray, FloatArray


@dataclass(frozen=True, slots=True)
class NestedRows:
    """Rows in the making: their grids, packed codes, and the sums of each tile."""

    scheme: NestedScheme
    cols: int
    tile_rows: int
    scale: FloatArray
    zero: FloatArray
    packed: CodeArray
    sums: npt.NDArray[np.float64]

    @classmethod
    def of(cls, scheme: NestedScheme, count: int, cols: int, tile_rows: int, packed: CodeArray) -> NestedRows:
        """For `count` rows."""
        scale, zero = (np.empty(count * scheme.groups(cols), np.float32) for _ in range(2))
        return cls(scheme, cols, tile_rows, scale, zero, packed, np.empty((-(-count // tile_rows), SUMS)))

    def find_ranges(self, address: int, kind: int, first: int, last: int) -> None:
        """Grids of rows first to last from their ranges."""
        scheme, groups = self.scheme, self.scheme.groups(self.cols)
        low, high = (np.zeros((last - first) * groups, np.float32) for _ in range(2))
        rows.range_rows(
            address + first * self.cols * (4 if kind == 0 else 2), kind, self.cols, 0, last - first, scheme.group_size,
            groups, low, high, np.empty(rows.SPAN_BUFFER, np.float32),
        )  # fmt: skip
        whole, per_row = self.cols // scheme.group_size, (last - first, groups)
        part = slice(first * groups, last * groups)
        scale, zero = (each[part].reshape(per_row) for each in (self.scale, self.zero))
        for columns in (slice(0, whole), slice(whole, groups)):
            if columns.stop > columns.start:
                ranges = (each.reshape(per_row)[:, columns] for each in (low, high))
                with np.errstate(over="ignore", invalid="ignore"):  # of what is not finite, which shows later
                    scale[:, columns], zero[:, columns] = scheme.grid(np, *ranges)

    def search(self, address: int, kind: int, method: Mse, first: int, last: int) -> None:
        """Grids of rows first to last that lose least."""
        scheme, groups = self.scheme, self.scheme.groups(self.cols)
        clips = np.array(method.starts(scheme), np.float32).reshape(-1, 2)
        starts = [int(start) for start in scheme.starts(self.cols)]
        for start, stop in zip(starts, [*starts[1:], groups], strict=True):
            size = min(scheme.group_size, self.cols - start * scheme.group_size)
            lots = -(-(stop - start) // LANES)
            nested_search.search_supers(
                address, kind, self.cols, first, last, groups, scheme.group_size, start, stop - start, size,
                clips, method.max_iterations, list(SCALE_DTYPES).index(scheme.scale_dtype), _numbers(scheme, size),
                self.scale, self.zero, np.empty(lots * LANES * size, np.float32),
                np.empty(rows.SPAN_BUFFER, np.float32), np.zeros(lots * nested_search.LANE_STATE, np.float32),
                np.zeros(3, np.float32), np.zeros(nested_search.FITTED),
            )  # fmt: skip

    def encode(self, address: int, kind: int, first: int, last: int) -> None:
        """Codes of rows first to last on their grids."""
        scheme = self.scheme
        nested_rows.encode_rows(
            address, kind, self.cols, first, last, self.tile_rows, scheme.group_size, scheme.groups(self.cols),
            scheme.bits, self.scale, self.zero, self.packed, row_bytes(self.cols, scheme.bits), self.sums,
            np.empty(rows.SPAN_BUFFER, np.float32), np.empty(rows.CODE_BUFFER, np.uint8), np.empty(rows.SUM_BUFFER),
            np.zeros(nested_rows.TAIL_BUFFER, np.float32),
        )  # fmt: skip


def _numbers(scheme: NestedScheme, size: int) -> FloatArray:
    """What the search knows of a scheme, and room for what it finds of a super-block."""
    numbers = np.zeros(nested_search.NUMBERS, np.float32)
    known = scheme.top, scheme.half, scheme.largest_scale_code, scheme.largest_zero_code, scheme.spread_unit
    numbers[: nested_search.OVER] = (*known, SPREADS / scheme.half, size)
    return numbers
