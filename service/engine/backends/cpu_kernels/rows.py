"""The kernels that a backend calls: some rows of a matrix at a time.

They take the addresses of what they only read, so that one compilation serves every input: mapped,
read-only, unaligned, of any dtype.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from service.engine.backends.cpu_kernels.bitpack import pack_span, unpack_span
from service.engine.backends.cpu_kernels.caching import kernel
from service.engine.backends.cpu_kernels.codes import (
    BLOCK,
    SUMS,
    add_sums,
    copy_floats,
    decode_integer,
    decode_nf4,
    encode_integer,
    encode_nf4,
    largest_of,
    sum_of,
)
from service.engine.backends.cpu_kernels.grids import group_range, make_grids, scale_bits
from service.engine.backends.cpu_kernels.spans import SPAN, address_of, as_f32
from service.engine.backends.cpu_kernels.vector import LANES

_ONE = np.float32(1.0)
#: Float32 that `span_buffer` holds: a span; and in `range_buffer` the ranges of its groups.
SPAN_BUFFER, RANGE_BUFFER = SPAN + LANES, 4 * (SPAN // LANES + LANES)
CODE_BUFFER, SUM_BUFFER = SPAN + 4 * LANES, SUMS * LANES


@njit(nogil=True)
def whole_vectors(count):
    """`count` rounded up to a multiple of LANES."""
    return (count + LANES - 1) // LANES * LANES


@njit(nogil=True)
def _grids_of_row(x, kind, first, cols, form, grids, scale, zero, scratch, ranges):
    """The grid of a row that is one group, longer than a span."""
    lows, highs = ranges[:LANES], ranges[LANES : 2 * LANES]
    lows[0] = highs[0] = np.float32(0.0)
    for start in range(0, cols, SPAN):
        count = min(SPAN, cols - start)
        low, high = group_range(as_f32(x, kind, first + start, count, scratch), whole_vectors(count))
        lows[0], highs[0] = min(lows[0], low), max(highs[0], high)
    _store_grids(ranges, LANES, 1, form, grids, scale, zero)


@njit(nogil=True)
def _grids_of_span(span, count, group, form, grids, scale, zero, ranges):
    """The grids of the groups of a span."""
    room = ranges.size // 4
    groups = 0
    for at in range(0, count, group):
        low, high = group_range(span + 4 * at, whole_vectors(min(group, count - at)))
        ranges[groups], ranges[room + groups] = low, high
        groups += 1
    _store_grids(ranges, room, groups, form, grids, scale, zero)


@njit(nogil=True)
def _store_grids(ranges, room, groups, form, grids, scale, zero):
    base = address_of(ranges)
    for g in range(0, groups, LANES):
        low = base + 4 * g
        make_grids(low, low + 4 * room, low + 8 * room, low + 12 * room, *form)
    for g in range(groups):
        scale[grids + g] = ranges[2 * room + g]
        zero[grids + g] = ranges[3 * room + g]


@njit(nogil=True, error_model="numpy")
def _encode_span(span, count, group, first_grid, grid_step, codebook, top, scale, zero, codes, sums):
    g = first_grid
    for at in range(0, count, group):
        n = whole_vectors(min(group, count - at))
        s = scale[g]
        if codebook:
            encode_nf4(span + 4 * at, n, _ONE / s, s, codes + at, sums)
        else:
            encode_integer(span + 4 * at, n, _ONE / s, s, zero[g], top, codes + at, sums)
        g += grid_step


@njit(nogil=True)
def _finish_sums(buffer, sums):
    address = address_of(buffer)
    for i in range(SUMS - 1):
        sums[i] = sum_of(address, i)
    sums[SUMS - 1] = largest_of(address)


@kernel
def quantize_rows(
    x, kind, cols, first_row, last_row, tile_rows, group, row_groups, bits, codebook, form, find,
    scale, zero, stored_scale, stored_zero, packed, row_bytes, sums,
    span_buffer, range_buffer, code_buffer, sum_buffer,
):  # fmt: skip
    """Quantize rows [first_row, last_row) and sum up the errors of each tile of `tile_rows` rows.

    With `find` the grids are made of each group's range and written to `scale` and `zero`, else
    they are taken from there. `row_groups` is 0 where one grid serves all rows; `stored_scale` and
    `stored_zero` may be empty.
    """
    scratch, codes, running = address_of(span_buffer), address_of(code_buffer), address_of(sum_buffer)
    wide = group > SPAN
    for row in range(first_row, last_row):
        if (row - first_row) % tile_rows == 0:
            sum_buffer[:] = 0.0
        first, grids = row * cols, row * row_groups
        if find and wide:
            _grids_of_row(x, kind, first, cols, form, grids, scale, zero, scratch, range_buffer)
        for start in range(0, cols, SPAN):
            count = min(SPAN, cols - start)
            span = as_f32(x, kind, first + start, count, scratch)
            g = grids if wide or row_groups == 0 else grids + start // group
            if find and not wide:
                _grids_of_span(span, count, group, form, g, scale, zero, range_buffer)
            _encode_span(
                span,
                count,
                min(group, BLOCK),
                g,
                1 if row_groups > 1 else 0,
                codebook,
                form[1],
                scale,
                zero,
                codes,
                running,
            )
            out = start // 8 * bits
            nbytes = row_bytes - out if start + count == cols else count // 8 * bits
            pack_span(codes, count, bits, address_of(packed) + row * row_bytes + out, nbytes)
        if stored_scale.size:
            for g in range(grids, grids + row_groups):
                stored_scale[g] = scale_bits(scale[g], form[4])
        if stored_zero.size:
            for g in range(grids, grids + row_groups):
                stored_zero[g] = np.uint8(np.int32(zero[g]))
        if row + 1 == last_row or (row + 1 - first_row) % tile_rows == 0:
            _finish_sums(sum_buffer, sums[row // tile_rows])


@kernel
def dequantize_rows(
    packed, row_bytes, cols, first_row, last_row, group, row_groups, bits, codebook, scale, zero, out,
    span_buffer, code_buffer,
):  # fmt: skip
    """Write what rows [first_row, last_row) stand for to `out`."""
    scratch, codes = address_of(span_buffer), address_of(code_buffer)
    for row in range(first_row, last_row):
        for start in range(0, cols, SPAN):
            count = min(SPAN, cols - start)
            inside = start // 8 * bits
            unpack_span(packed + row * row_bytes + inside, row_bytes - inside, bits, count, codes)
            step = min(group, SPAN)
            for at in range(0, count, step):
                n = min(step, count - at)
                g = row * row_groups + ((start + at) // group if row_groups else 0)
                target = address_of(out) + 4 * (row * cols + start + at)
                ragged = n % LANES != 0
                place, vectors = (scratch, whole_vectors(n)) if ragged else (target, n)
                if codebook:
                    decode_nf4(codes + at, vectors, scale[g], place)
                else:
                    decode_integer(codes + at, vectors, scale[g], zero[g], place)
                if ragged:
                    copy_floats(scratch, n, target)


@kernel
def compare_elements(x, x_kind, y, y_kind, first, last, tile, sums, x_buffer, y_buffer, sum_buffer):
    """Sum up the differences of elements [first, last), tile by tile."""
    for start in range(first, last, tile):
        sum_buffer[:] = 0.0
        end = min(start + tile, last)
        for at in range(start, end, SPAN):
            count = min(SPAN, end - at)
            a = as_f32(x, x_kind, at, count, address_of(x_buffer))
            b = as_f32(y, y_kind, at, count, address_of(y_buffer))
            add_sums(a, b, whole_vectors(count), address_of(sum_buffer))
        _finish_sums(sum_buffer, sums[start // tile])
