"""Rows on grids with zero points that are fractions: their ranges, and their codes with what these lose."""

from __future__ import annotations

from llvmlite import ir
from numba import njit
from numba.core import types

from service.engine.backends.cpu_kernels.bitpack import pack_span
from service.engine.backends.cpu_kernels.caching import kernel
from service.engine.backends.cpu_kernels.codes import ROUNDER, SUMS, add_sums, decode_integer, encode
from service.engine.backends.cpu_kernels.rows import finish_sums
from service.engine.backends.cpu_kernels.spans import SPAN, address_of, as_f32, whole_vectors
from service.engine.backends.cpu_kernels.vector import I32, LANES, Vec, emitted

#: Float32 for a short group: its values, and sums that do not count.
TAIL_BUFFER = 2 * 2 * SUMS * LANES

_P, _F = types.intp, types.float32


@emitted(types.none, _P, _P, _F, _F, _F, _P, _P)
def encode_fraction(
    builder: ir.IRBuilder, source: ir.Value, count: ir.Value, scale: ir.Value, zero: ir.Value, top: ir.Value,
    codes: ir.Value, sums: ir.Value,
) -> None:  # fmt: skip
    """Codes of `count` float32 (whole vectors) as `FreeGrid.encode` has them."""
    scales, zeros, tops = (Vec(builder, v).splat() for v in (scale, zero, top))
    none, rounder = scales.const(0.0), scales.const(ROUNDER)
    inverse = (scales > none).select(scales.const(1.0) / scales, none)
    highest = tops + rounder

    def rule(x: Vec) -> tuple[Vec, Vec]:
        shifted = (x * inverse + zeros + rounder).max(rounder).min(highest)
        return shifted.cast(I32), (shifted - rounder - zeros) * scales

    encode(builder, source, count, codes, sums, rule)


@njit(nogil=True)
def _encode_short(span, count, scale, zero, top, codes, sums, tail):
    """A group that does not fill its vectors: what fills them up is not to count, and does not become 0 by itself."""
    vectors, values = whole_vectors(count), address_of(tail)
    encode_fraction(span, vectors, scale, zero, top, codes, values + 4 * tail.size // 2)
    decode_integer(codes, vectors, scale, zero, values, False)
    tail[count:vectors] = 0.0
    add_sums(span, values, vectors, sums)


@kernel
def encode_rows(
    x, kind, cols, first_row, last_row, tile_rows, group, row_groups, bits, scale, zero, packed, row_bytes, sums,
    span_buffer, code_buffer, sum_buffer, tail_buffer,
):  # fmt: skip
    """Pack rows [first_row, last_row) and sum up the errors of each tile of `tile_rows` rows."""
    scratch, codes, running = address_of(span_buffer), address_of(code_buffer), address_of(sum_buffer)
    top = (1 << bits) - 1
    for row in range(first_row, last_row):
        if (row - first_row) % tile_rows == 0:
            sum_buffer[:] = 0.0
        for start in range(0, cols, SPAN):
            count, g = min(SPAN, cols - start), row * row_groups + start // group
            span = as_f32(x, kind, row * cols + start, count, scratch)
            for at in range(0, count, group):
                n, place = min(group, count - at), span + 4 * at
                if n % LANES == 0:
                    encode_fraction(place, n, scale[g], zero[g], top, codes + at, running)
                else:
                    _encode_short(place, n, scale[g], zero[g], top, codes + at, running, tail_buffer)
                g += 1
            out = start // 8 * bits
            nbytes = row_bytes - out if start + count == cols else count // 8 * bits
            pack_span(codes, count, bits, address_of(packed) + row * row_bytes + out, nbytes)
        if row + 1 == last_row or (row + 1 - first_row) % tile_rows == 0:
            finish_sums(sum_buffer, sums[row // tile_rows])
