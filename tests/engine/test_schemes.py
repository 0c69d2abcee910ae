"""What the integer and table schemes promise beyond what every scheme does (`tests/contract/test_schemes.py`)."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.engine.methods.minmax import MinMax
from service.engine.packing import row_bytes
from service.engine.schemes.base import SCALE_DTYPES, SCALE_LIMITS, PlainScaleDtype, Scheme
from service.engine.schemes.codebook import NF4_TABLE, CodebookScheme
from service.engine.schemes.integer import IntegerScheme

INTEGERS = [IntegerScheme(bits=b, is_symmetric=s) for b in (2, 3, 4, 5, 6, 8) for s in (False, True)]


def name(scheme: Scheme) -> str:
    """For the reader of a test's output."""
    return f"{scheme.id}-{'symmetric' if scheme.symmetric else 'asymmetric'}"


def round_trip(x: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, values and scale of groups x (n, g)."""
    scale, zero = MinMax().find(np, x, scheme)
    codes = scheme.encode(np, x, scale, zero)
    return codes, scheme.decode(np, codes, scale, zero), scale


@pytest.mark.parametrize("scheme", INTEGERS, ids=name)
def test_the_codes_cover_the_range_and_no_value_is_off_by_more_than_a_step(scheme: IntegerScheme, rng) -> None:
    x = rng.uniform(-1, 1, (20, 4096)).astype(np.float32)
    codes, decoded, scale = round_trip(x, scheme)
    lowest = 1 if scheme.symmetric else 0
    assert set(np.unique(codes).tolist()) >= set(range(lowest, scheme.top + 1))
    # Half a step for the rounding; the zero point's own rounding can cut the ends by another half.
    assert (np.abs(x - decoded) <= scale[:, None] * 1.01).all()


def test_nf4_gives_every_level_its_own_code_and_reads_it_back_exactly() -> None:
    codes, decoded, _ = round_trip(NF4_TABLE[None] * np.float32(4.0), CodebookScheme())
    assert codes[0].tolist() == list(range(16))
    assert np.array_equal(decoded[0], NF4_TABLE * np.float32(4.0))


@pytest.mark.parametrize("dtype", get_args(PlainScaleDtype))
@given(st.floats(0.0, float(np.finfo(np.float32).max), width=32, exclude_min=True))
def test_a_stored_scale_is_a_number_of_its_dtype_whose_reciprocal_is_finite(dtype: str, scale: float) -> None:
    stored = IntegerScheme(scale_dtype=dtype).store_scale(np, np.array([scale], np.float32))
    smallest, largest = SCALE_LIMITS[dtype]
    assert smallest <= stored[0] <= largest
    assert stored[0] == stored.astype(SCALE_DTYPES[dtype]).astype(np.float32)[0]
    assert np.isfinite(np.float32(1.0) / stored[0])


@pytest.mark.parametrize("dtype", get_args(PlainScaleDtype))
def test_storing_a_scale_again_changes_nothing(dtype: str, rng) -> None:
    scheme = IntegerScheme(scale_dtype=dtype)
    stored = scheme.store_scale(np, np.exp(rng.uniform(-30, 30, 1000)).astype(np.float32))
    assert np.array_equal(scheme.store_scale(np, stored), stored)


def test_the_bytes_of_a_tensor_count_codes_scales_and_zero_points() -> None:
    symmetric, asymmetric = (IntegerScheme(is_symmetric=s, group_size=128) for s in (True, False))
    codes = 3 * row_bytes(300, 4)
    assert symmetric.stored_bytes(3, 300) == codes + 9 * 2
    assert asymmetric.stored_bytes(3, 300) == codes + 9 * 2 + 5
    assert IntegerScheme(granularity="tensor", is_symmetric=True).stored_bytes(3, 300) == codes + 2


@pytest.mark.parametrize(
    "wrong", [{"bits": 7}, {"bits": 9}, {"group_size": 17}, {"scale_dtype": "F8"}, {"sparse": True}]
)
def test_parameters_that_no_scheme_has_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        IntegerScheme(**wrong)
