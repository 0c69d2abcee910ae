"""n-bit packing: what goes in comes out, at the bits that the layout promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.packing import pack_columns, pack_flat, pack_rows, row_bytes, unpack_flat, unpack_rows

WIDTHS = range(2, 9)


def some_codes(bits: int, rows: int, cols: int, seed: int) -> np.ndarray:
    """Random codes of a width."""
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, cols)).astype(np.uint8)


@given(st.sampled_from(WIDTHS), st.integers(1, 9), st.integers(1, 150), st.integers(0, 2**32 - 1))
def test_rows_come_back_as_they_were(bits: int, rows: int, cols: int, seed: int) -> None:
    codes = some_codes(bits, rows, cols, seed)
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, row_bytes(cols, bits))
    assert np.array_equal(unpack_rows(packed, bits, cols), codes)


@given(st.sampled_from(WIDTHS), st.integers(1, 150), st.integers(0, 2**32 - 1))
def test_a_flat_stream_comes_back_as_it_was_and_wastes_less_than_a_byte(bits: int, count: int, seed: int) -> None:
    codes = some_codes(bits, 1, count, seed)[0]
    data = pack_flat(codes, bits)
    assert 8 * (len(data) - 1) < bits * count <= 8 * len(data)
    assert np.array_equal(unpack_flat(data, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_element_i_lies_at_bit_i_times_the_width_and_the_rest_is_zero(bits: int) -> None:
    codes = some_codes(bits, 3, 37, seed=bits)
    for row, packed in zip(codes, pack_rows(codes, bits), strict=True):
        number = sum(int(code) << (i * bits) for i, code in enumerate(row))
        assert int.from_bytes(packed.tobytes(), "little") == number


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_that_fill_whole_words_are_one_flat_stream(bits: int) -> None:
    codes = some_codes(bits, 5, 64, seed=bits)
    assert pack_rows(codes, bits).tobytes() == pack_flat(codes, bits)


@pytest.mark.parametrize(
    ("cols", "bits", "expected"), [(1, 2, 4), (16, 2, 4), (17, 2, 8), (11, 3, 8), (4, 8, 4), (5, 8, 8)]
)
def test_a_row_takes_a_whole_number_of_words(cols: int, bits: int, expected: int) -> None:
    assert row_bytes(cols, bits) == expected


@given(st.sampled_from(WIDTHS), st.integers(1, 70), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_columns_are_packed_as_the_rows_of_the_transpose_are(bits: int, rows: int, cols: int, seed: int) -> None:
    codes = some_codes(bits, rows, cols, seed)
    expected = pack_rows(np.ascontiguousarray(codes.T), bits).view("<u4").T
    assert np.array_equal(pack_columns(codes, bits), expected)
