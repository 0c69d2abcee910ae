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
    decode_floats,
    decode_integer,
    decode_nf4,
    encode_floats,
    encode_integer,
    encode_nf4,
    largest_of,
    settle_streams,
    sum_of,
)
from service.engine.backends.cpu_kernels.grids import (
    make_grids,
    store_scale_bits,
    store_scale_bytes,
    store_zero_codes,
)
from service.engine.backends.cpu_kernels.minifloats import NF4, NO_TABLE
from service.engine.backends.cpu_kernels.pairs import (
    HALF_PAIR,
    PAIR,
    PARTS,
    RUN,
    clear,
    encode_floats_packed,
    encode_integer_4,
    encode_integer_8,
    encode_nf4_4,
    settle,
    store_ranges,
)
from service.engine.backends.cpu_kernels.spans import KIND_F32, SPAN, address_of, as_f32, item_bytes, whole_vectors
from service.engine.backends.cpu_kernels.vector import LANES

_ONE = np.float32(1.0)
#: Float32 that `span_buffer` holds: a span; and in `range_buffer`, of its groups, lows, highs, scales, zero points and
#: whether they fit (see `make_grids`).
GRID_NUMBERS = 5
SPAN_BUFFER, RANGE_BUFFER = SPAN + LANES, GRID_NUMBERS * (SPAN // LANES + LANES)
#: Bytes that `code_buffer` holds; and the float64 sums of a tile, with the float32 parts of a span behind them.
CODE_BUFFER, SUM_BUFFER = SPAN + 4 * LANES, (SUMS + PARTS) * LANES


@njit(nogil=True)
def is_paired(cols, group):
    """Whether rows are whole pairs of vectors, and groups as well or half a pair, and so need no copy as float32."""
    return cols % PAIR == 0 and (group % PAIR == 0 or group == HALF_PAIR)


@njit(nogil=True)
def span_ranges(x, kind, first, count, group, paired, symmetric, scratch, low, high):
    """Write the ranges of the groups of `count` elements."""
    if paired:
        store_ranges(x + item_bytes(kind) * first, kind, count, group, symmetric, low, high)
    else:
        for at in range(0, count, group):
            n, place = min(group, count - at), at // group * 4
            span = as_f32(x, kind, first + at, n, scratch)
            store_ranges(span, KIND_F32, whole_vectors(n), whole_vectors(n), symmetric, low + place, high + place)


@njit(nogil=True)
def _grids_of_row(x, kind, first, cols, paired, form, table, grids, scale, zero, scratch, ranges):
    """The grid of a row that is one group, longer than a span."""
    base, lowest, highest = address_of(ranges), np.float32(0.0), np.float32(0.0)
    for start in range(0, cols, SPAN):
        n = min(SPAN, cols - start)
        span_ranges(x, kind, first + start, n, n, paired, form[3], scratch, base, base + 4 * LANES)
        lowest, highest = min(lowest, ranges[0]), max(highest, ranges[LANES])
    ranges[0], ranges[LANES] = lowest, highest
    _store_grids(ranges, LANES, 1, form, table, grids, scale, zero)


@njit(nogil=True)
def _grids_of_span(x, kind, first, count, group, paired, form, table, grids, scale, zero, scratch, ranges):
    """The grids of the groups of a span."""
    room = ranges.size // GRID_NUMBERS
    base = address_of(ranges)
    span_ranges(x, kind, first, count, group, paired, form[3], scratch, base, base + 4 * room)
    groups = (count + group - 1) // group
    _store_grids(ranges, room, groups, form, table, grids, scale, zero)


@njit(nogil=True)
def _store_grids(ranges, room, groups, form, table, grids, scale, zero):
    base = address_of(ranges)
    for g in range(0, groups, LANES):
        low = base + 4 * g
        make_grids(low, low + 4 * room, low + 8 * room, low + 12 * room, low + 16 * room, table == NF4, *form)
    for g in range(groups):
        scale[grids + g] = ranges[2 * room + g]
        zero[grids + g] = ranges[3 * room + g]


@njit(nogil=True, error_model="numpy")
def _encode_span(span, count, group, first_grid, grid_step, table, top, scale, zero, codes, sums):
    """Codes of a span of float32, a byte each."""
    g = first_grid
    for at in range(0, count, group):
        n = whole_vectors(min(group, count - at))
        s = scale[g]
        if table == NO_TABLE:
            encode_integer(span + 4 * at, n, _ONE / s, s, zero[g], top, codes + at, sums)
        elif table == NF4:
            encode_nf4(span + 4 * at, n, _ONE / s, s, codes + at, sums)
        else:
            encode_floats(table, span + 4 * at, n, _ONE / s, s, codes + at, sums)
        g += grid_step


@njit(nogil=True, error_model="numpy")
def _encode_pairs(x, kind, count, group, first_grid, grid_step, bits, table, top, scale, zero, fits, target, parts):
    """Codes of a span as it is stored; packed if they have 4 bits, else a byte each."""
    clear(parts)
    for at in range(0, count, RUN):
        n, size = min(RUN, count - at), min(group, RUN)
        source, g = x + item_bytes(kind) * at, at // size * grid_step
        fit, g = fits + 4 * g, 4 * (first_grid + g)
        scales, zeros = address_of(scale) + g, address_of(zero) + g
        if table > NF4:
            encode_floats_packed(
                table, source, kind, n, scales, zeros, fit, size, grid_step, target + at * bits // 8, parts
            )
        elif table == NF4:
            encode_nf4_4(source, kind, n, scales, zeros, fit, size, grid_step, target + at // 2, parts)
        elif bits == 4:
            encode_integer_4(source, kind, n, scales, zeros, fit, size, grid_step, top, target + at // 2, parts)
        else:
            encode_integer_8(source, kind, n, scales, zeros, fit, size, grid_step, top, target + at, parts)


@njit(nogil=True)
def _quantize_span(
    x, kind, at, count, group, paired, grid, grid_step, bits, table, top, scale, zero, fits, target,
    nbytes, scratch, codes, sums,
):  # fmt: skip
    """Packed codes of `count` elements from `at` on, and what they lose added to the sums."""
    packs = paired and (bits == 4 or bits == 8)
    done = False
    if paired:
        source, place, parts = x + item_bytes(kind) * at, target if packs else codes, sums + 8 * SUMS * LANES
        _encode_pairs(source, kind, count, group, grid, grid_step, bits, table, top, scale, zero, fits, place, parts)
        done = settle(parts, sums)
    if not done:
        span = as_f32(x, kind, at, count, scratch)
        _encode_span(span, count, min(group, BLOCK), grid, grid_step, table, top, scale, zero, codes, sums)
    if not packs:
        pack_span(codes, count, bits, target, nbytes)


@njit(nogil=True)
def finish_sums(buffer, sums):
    """Write the sums of a tile."""
    address = address_of(buffer)
    for i in range(SUMS - 1):
        sums[i] = sum_of(address, i)
    sums[SUMS - 1] = largest_of(address)


@kernel
def quantize_rows(
    x, kind, cols, first_row, last_row, tile_rows, group, row_groups, bits, table, form, find,
    scale, zero, stored_scale, stored_zero, packed, row_bytes, sums,
    span_buffer, range_buffer, code_buffer, sum_buffer,
):  # fmt: skip
    """Quantize rows [first_row, last_row) and sum up the errors of each tile of `tile_rows` rows.

    With `find` the grids are made of each group's range and written to `scale` and `zero`, else
    they are taken from there. `row_groups` is 0 where one grid serves all rows; `stored_scale` and
    `stored_zero` may be empty.
    """
    scratch, codes, running = address_of(span_buffer), address_of(code_buffer), address_of(sum_buffer)
    wide, paired = group > SPAN, is_paired(cols, group)
    range_buffer[:] = 0.0  # of grids that are given, nothing is known
    fits = address_of(range_buffer) + 16 * (LANES if wide else range_buffer.size // GRID_NUMBERS)
    for row in range(first_row, last_row):
        if (row - first_row) % tile_rows == 0:
            sum_buffer[:] = 0.0
        first, grids = row * cols, row * row_groups
        if find and wide:
            _grids_of_row(x, kind, first, cols, paired, form, table, grids, scale, zero, scratch, range_buffer)
        for start in range(0, cols, SPAN):
            at, count = first + start, min(SPAN, cols - start)
            g = grids if wide or row_groups == 0 else grids + start // group
            if find and not wide:
                _grids_of_span(x, kind, at, count, group, paired, form, table, g, scale, zero, scratch, range_buffer)
            out = start // 8 * bits
            nbytes = row_bytes - out if start + count == cols else count // 8 * bits
            _quantize_span(
                x, kind, at, count, group, paired, g, 1 if row_groups > 1 else 0, bits, table, form[1],
                scale, zero, fits, address_of(packed) + row * row_bytes + out, nbytes, scratch, codes, running,
            )  # fmt: skip
        if row + 1 == last_row or (row + 1 - first_row) % tile_rows == 0:
            finish_sums(sum_buffer, sums[row // tile_rows])
    first, count = first_row * row_groups, (last_row - first_row) * row_groups
    if stored_scale.size:
        store_scale_bits(address_of(scale) + 4 * first, count, form[4], address_of(stored_scale) + 2 * first)
    if stored_zero.size:
        store_zero_codes(address_of(zero) + 4 * first, count, address_of(stored_zero) + first)


@kernel
def store_small_scales(scale, first, last, kind, under, target):
    """Write scales [first, last) as they are stored in 8 bits."""
    store_scale_bytes(address_of(scale) + 4 * first, last - first, kind, under, address_of(target) + first)


@kernel
def range_rows(x, kind, cols, first_row, last_row, group, row_groups, low, high, span_buffer):
    """Write the ranges of all groups of rows [first_row, last_row), 0 included, to `low` and `high`."""
    scratch, paired = address_of(span_buffer), is_paired(cols, group)
    for row in range(first_row, last_row):
        for start in range(0, cols, SPAN):
            place = 4 * (row * row_groups + start // group)
            lows, highs = address_of(low) + place, address_of(high) + place
            span_ranges(
                x, kind, row * cols + start, min(SPAN, cols - start), group, paired, False, scratch, lows, highs
            )


@njit(nogil=True)
def _decode_small(table, codes, start, count, group, row_groups, row, scale, target, stream, scratch):
    """What `dequantize_rows` does with a span, for small floating-point numbers.

    Apart from the others, whose loop over short groups would be slower with these in it.
    """
    step = min(group, SPAN)
    for at in range(0, count, step):
        n = min(step, count - at)
        s = scale[row * row_groups + ((start + at) // group if row_groups else 0)]
        if n % LANES == 0:
            decode_floats(table, codes + at, n, s, target + 4 * at, stream)
        else:
            decode_floats(table, codes + at, whole_vectors(n), s, scratch, False)
            copy_floats(scratch, n, target + 4 * at)


@kernel
def dequantize_rows(
    packed, row_bytes, cols, first_row, last_row, group, row_groups, bits, table, scale, zero, out, stream,
    span_buffer, code_buffer,
):  # fmt: skip
    """Write what rows [first_row, last_row) stand for to `out`; `stream`: past the cache, as it would not fit."""
    scratch, codes = address_of(span_buffer), address_of(code_buffer)
    for row in range(first_row, last_row):
        for start in range(0, cols, SPAN):
            count = min(SPAN, cols - start)
            inside = start // 8 * bits
            unpack_span(packed + row * row_bytes + inside, row_bytes - inside, bits, count, codes)
            if table > NF4:
                place = address_of(out) + 4 * (row * cols + start)
                _decode_small(table, codes, start, count, group, row_groups, row, scale, place, stream, scratch)
                continue
            step = min(group, SPAN)
            for at in range(0, count, step):
                n = min(step, count - at)
                g = row * row_groups + ((start + at) // group if row_groups else 0)
                target = address_of(out) + 4 * (row * cols + start + at)
                ragged = n % LANES != 0
                place, vectors = (scratch, whole_vectors(n)) if ragged else (target, n)
                if table == NF4:
                    decode_nf4(codes + at, vectors, scale[g], place, stream and not ragged)
                else:
                    decode_integer(codes + at, vectors, scale[g], zero[g], place, stream and not ragged)
                if ragged:
                    copy_floats(scratch, n, target)
    settle_streams()


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
        finish_sums(sum_buffer, sums[start // tile])
