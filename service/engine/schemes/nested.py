"""Integers of 2 to 6 bits in small groups whose scales and zero points are codes themselves: x ≈ (q - z) * s.

In a row, SUPER_SIZE elements make a super-block. It has a super-scale S, stored in `scale_dtype`, and a spread U, a
byte. Each of its groups has a scale code c and a zero code k, of as many bits as GRID_BITS says:

    s = S * (c / C),  c from 0 to C = 2**scale_bits - 1
    z = (2**bits - 1) / 2 * (1 + U * k / (255 * K)),  k from -K to K = 2**(zero_bits - 1) - 1

One c of a super-block is C, and one k is K or -K, so that S and U can be told from scales and zero points. The last
super-block of a row may be short; a short group at the end of a row is one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from service.engine.packing import pack_rows, row_bytes, unpack_rows
from service.engine.schemes.base import SCALE_DTYPES, SCALE_LIMITS, AnyArray
from service.engine.schemes.free_grid import FreeGrid
from service.engine.schemes.nested_search import settle_supers
from service.engine.tensors import Array, CodeArray, FloatArray

#: Largest code of a spread.
SPREADS = 255
#: A super-scale is no smaller, so that the reciprocals of all scales are finite.
SMALLEST_SUPER = 2.0**-100
#: Elements of a super-block.
SUPER_SIZE = 512
#: By width: the bits of scale and of zero codes that lose least for their size, on weights of trained transformers.
GRID_BITS = {2: (4, 4), 3: (3, 3), 4: (4, 3), 5: (4, 3), 6: (4, 4)}


class NestedScheme(FreeGrid):
    """`int2_nested` … `int6_nested`; parameters: group_size, scale_dtype."""

    ids: ClassVar[dict[str, int]] = {f"int{b}_nested": b for b in GRID_BITS}

    group_size: Literal[16, 32] = 16
    scale_dtype: Literal["F32", "F16", "BF16"] = "F16"

    @property
    def id(self) -> str:
        """`int`, the width and `_nested`."""
        return f"int{self.bits}_nested"

    @property
    def free(self) -> FreeGrid:
        """Groups that do not share anything."""
        return FreeGrid(bits=self.bits, group_size=self.group_size)

    @property
    def scale_bits(self) -> int:
        """Of a scale code."""
        return GRID_BITS[self.bits][0]

    @property
    def zero_bits(self) -> int:
        """Of a zero code."""
        return GRID_BITS[self.bits][1]

    @property
    def largest_scale_code(self) -> int:
        """That of a group whose scale is the super-scale."""
        return (1 << self.scale_bits) - 1

    @property
    def largest_zero_code(self) -> int:
        """K: that of a group whose zero point is as far from the middle as the spread says; -K of the other side."""
        return (1 << (self.zero_bits - 1)) - 1

    @property
    def super_groups(self) -> int:
        """Groups of a whole super-block."""
        return SUPER_SIZE // self.group_size

    def store_super(self, xp: Any, scale: AnyArray) -> AnyArray:
        """A super-scale as it reads back after being stored; 0 where all is zero."""
        smallest, largest = SCALE_LIMITS[self.scale_dtype]
        stored = xp.minimum(xp.maximum(scale, max(smallest, SMALLEST_SUPER)), largest)
        if self.scale_dtype != "F32":
            stored = xp.astype(xp.astype(stored, SCALE_DTYPES[self.scale_dtype]), xp.float32)
        return xp.where(scale > 0, stored, 0.0)

    def codes_under(
        self, xp: Any, scale: AnyArray, zero: AnyArray, over: AnyArray, spread: AnyArray
    ) -> tuple[AnyArray, AnyArray]:
        """Scale and zero codes, float32 (..., groups), next to scales and zero points, under S and U (..., 1)."""
        most, farthest = self.largest_scale_code, self.largest_zero_code
        c = xp.clip(xp.round(scale / xp.where(over > 0, over, 1.0) * most), 0, most)
        far = (zero - self.half) * (SPREADS / self.half)
        k = xp.clip(xp.round(far / xp.where(spread > 0, spread, 1.0) * farthest), -farthest, farthest)
        # Whatever rounding does, the group that S and U are taken from has the largest codes.
        distance = xp.abs(far)
        c = xp.where(scale == xp.max(scale, axis=-1, keepdims=True), float(most), c)
        k = xp.where(distance == xp.max(distance, axis=-1, keepdims=True), xp.sign(far) * farthest, k)
        return xp.where(over > 0, c, 0.0), xp.where(spread > 0, k, 0.0)

    def under(self, over: AnyArray, spread: AnyArray, c: AnyArray, k: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Scales and zero points (..., groups) of these codes under S and U (..., 1)."""
        zero = (spread * k) * self.spread_unit + self.half
        return over * (c / self.largest_scale_code), zero

    @property
    def spread_unit(self) -> float:
        """How far a zero point moves with a spread of 1 from one code to the next."""
        return self.half / (SPREADS * self.largest_zero_code)

    def spread_of(self, xp: Any, zero: AnyArray) -> AnyArray:
        """U (..., 1), a whole number, for the zero points of a super-block's groups."""
        return xp.round(xp.max(xp.abs(zero - self.half), axis=-1, keepdims=True) * (SPREADS / self.half))

    def nest(self, xp: Any, scale: AnyArray, zero: AnyArray) -> tuple[AnyArray, AnyArray]:
        """The next scales and zero points (..., groups) that a row can have."""
        found = []
        for span in self.spans(scale.shape[-1]):
            s, z = (_of_supers(xp, part[..., None], span)[..., 0] for part in (scale, zero))
            over, spread = self.store_super(xp, xp.max(s, axis=-1, keepdims=True)), self.spread_of(xp, z)
            s, z = self.under(over, spread, *self.codes_under(xp, s, z, over, spread))
            found.append([xp.reshape(part, (*scale.shape[:-1], -1)) for part in (s, z)])
        return _joined(xp, found)

    def grid(self, xp: Any, lo: AnyArray, hi: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Those next to grids of the ranges."""
        return self.nest(xp, *super().grid(xp, lo, hi))

    def refit(
        self, xp: Any, x: AnyArray, codes: AnyArray, scale: AnyArray, zero: AnyArray, weights: AnyArray | None
    ) -> tuple[AnyArray, AnyArray]:
        """Those next to what each group alone would have."""
        return self.nest(xp, *super().refit(xp, x, codes, scale, zero, weights))

    def settle(
        self, xp: Any, x: AnyArray, scale: AnyArray, zero: AnyArray, weights: AnyArray | None
    ) -> tuple[AnyArray, AnyArray]:
        """See `Scheme.settle`; of no super-block is the error above that of grids of the ranges."""
        found = []
        for span in self.spans(scale.shape[-1]):
            s, z = (_of_supers(xp, part[..., None], span)[..., 0] for part in (scale, zero))
            supers = _of_supers(xp, x, span)
            w = None if weights is None else _of_supers(xp, xp.broadcast_to(weights, x.shape), span)
            s, z = settle_supers(xp, supers, self, s, z, w)
            found.append([xp.reshape(part, (*scale.shape[:-1], -1)) for part in (s, z)])
        return _joined(xp, found)

    def spans(self, groups: int) -> Iterator[tuple[int, int, int]]:
        """(first, last, groups of each) of whole super-blocks in a row, then of the short one at its end."""
        whole = groups // self.super_groups * self.super_groups
        if whole:
            yield 0, whole, self.super_groups
        if whole < groups:
            yield whole, groups, groups - whole

    def starts(self, cols: int) -> npt.NDArray[np.intp]:
        """The first group of each super-block in a row."""
        whole = cols // self.group_size
        firsts = list(range(0, whole, self.super_groups))
        return np.array(firsts + [whole] * (whole < self.groups(cols)), np.intp)

    def grid_bytes(self, cols: int) -> tuple[int, int]:
        """See `Scheme.grid_bytes`."""
        groups, supers = self.groups(cols), len(self.starts(cols))
        scales = supers * SCALE_DTYPES[self.scale_dtype].itemsize + -(-groups * self.scale_bits // 8)
        return scales, supers + -(-groups * self.zero_bits // 8)

    def grid_arrays(self, scale: bytes | memoryview, zero: bytes | memoryview | None, cols: int) -> Any:
        """See `Scheme.grid_arrays`."""
        assert zero is not None, "it is never symmetric"
        scales, zeros = self.grid_bytes(cols)
        return np.frombuffer(scale, np.uint8).reshape(-1, scales), np.frombuffer(zero, np.uint8).reshape(-1, zeros)

    def stored_grid(self, scale: FloatArray, zero: FloatArray, cols: int) -> tuple[Array, CodeArray | None]:
        """Super-scales and scale codes of each row, uint8 (rows, bytes); spreads and zero codes likewise."""
        starts = self.starts(cols)
        counts = np.diff([*starts, scale.shape[1]])
        over = np.maximum.reduceat(scale, starts, axis=1)
        each = np.repeat(over, counts, axis=1)
        c = np.rint(scale / np.where(each > 0, each, 1) * np.float32(self.largest_scale_code))
        far = np.rint((zero - np.float32(self.half)) * np.float32(1 / self.spread_unit))
        spread = np.maximum.reduceat(np.abs(far), starts, axis=1) / self.largest_zero_code
        each = np.repeat(spread, counts, axis=1)
        k = far / np.where(each > 0, each, 1) + self.largest_zero_code
        stored = np.ascontiguousarray(over.astype(SCALE_DTYPES[self.scale_dtype])).view(np.uint8)
        return (
            np.concatenate([stored, _packed(c, self.scale_bits)], axis=1),
            np.concatenate([spread.astype(np.uint8), _packed(k, self.zero_bits)], axis=1),
        )

    def float_grid(self, scale: Array, zero: CodeArray | None, cols: int) -> tuple[FloatArray, FloatArray]:
        """See `Scheme.float_grid`."""
        assert zero is not None, "it is never symmetric"
        starts, groups = self.starts(cols), self.groups(cols)
        counts = np.diff([*starts, groups])
        dtype = SCALE_DTYPES[self.scale_dtype]
        wide = len(starts) * dtype.itemsize
        over = np.ascontiguousarray(scale[:, :wide]).view(dtype).astype(np.float32)
        c = unpack_rows(scale[:, wide:].view(np.uint8), self.scale_bits, groups).astype(np.float32)
        spread = zero[:, : len(starts)].astype(np.float32)
        k = unpack_rows(zero[:, len(starts) :], self.zero_bits, groups).astype(np.float32) - self.largest_zero_code
        return self.under(np.repeat(over, counts, axis=1), np.repeat(spread, counts, axis=1), c, k)

    def largest_scale(self, scale: Array, cols: int) -> float:
        """See `Scheme.largest_scale`."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        over = np.ascontiguousarray(scale[:, : len(self.starts(cols)) * dtype.itemsize]).view(dtype)
        return float(over.astype(np.float32).max()) or 1.0  # any dtype holds the 0 of zeros

    def stored_bytes(self, rows: int, cols: int) -> int:
        """Codes, and all that scales and zero points are made of."""
        return rows * (row_bytes(cols, self.bits) + sum(self.grid_bytes(cols)))


def _of_supers(xp: Any, x: AnyArray, span: tuple[int, int, int]) -> AnyArray:
    """The groups x (..., groups, g) of a span, by super-blocks: (..., supers, groups of each, g)."""
    first, last, each = span
    return xp.reshape(x[..., first:last, :], (*x.shape[:-2], (last - first) // each, each, x.shape[-1]))


def _packed(codes: FloatArray, bits: int) -> CodeArray:
    """Codes (rows, groups), each row filled up to a whole byte."""
    return pack_rows(codes.astype(np.uint8), bits)[:, : -(-codes.shape[1] * bits // 8)]


def _joined(xp: Any, found: list[list[AnyArray]]) -> tuple[AnyArray, AnyArray]:
    """Parts of rows beside each other."""
    scale, zero = (xp.concat(parts, axis=-1) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True))
    return scale, zero
