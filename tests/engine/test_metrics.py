"""The numbers of a report, from sums that add up."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.backends.reference import ReferenceBackend
from service.engine.metrics import ErrorSums, Quality


def sums(x: np.ndarray, y: np.ndarray) -> ErrorSums:
    """As a backend measures them."""
    return ReferenceBackend().compare(x, y)


@given(st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_the_sums_of_pieces_are_the_sums_of_the_whole(cut: int, seed: int) -> None:
    x, y = np.random.default_rng(seed).standard_normal((2, 21, 5)).astype(np.float32)
    whole, parts = sums(x, y), sums(x[:cut], y[:cut]) + sums(x[cut:], y[cut:])
    assert dataclasses.astuple(parts) == pytest.approx(dataclasses.astuple(whole), rel=1e-12)


def test_nothing_added_changes_nothing(rng) -> None:
    measured = sums(*rng.standard_normal((2, 4, 4)).astype(np.float32))
    assert measured + ErrorSums() == measured == ErrorSums() + measured


def test_one_piece_that_is_not_finite_spoils_the_whole() -> None:
    assert not (ErrorSums() + ErrorSums(finite=False)).finite


def test_equal_values_have_no_error_and_no_noise_to_speak_of(rng) -> None:
    x = rng.standard_normal((10, 10)).astype(np.float32)
    same = sums(x, x)
    assert same.cosine_similarity == pytest.approx(1.0)
    assert (same.relative_error, same.max_abs, same.sqnr_db) == (0.0, 0.0, None)


def test_the_figures_are_those_of_numpy(rng) -> None:
    x, y = rng.standard_normal((2, 30, 30)).astype(np.float32)
    measured = sums(x, y)
    a, b = x.astype(np.float64).ravel(), y.astype(np.float64).ravel()
    norm = np.linalg.norm
    assert measured.cosine_similarity == pytest.approx(a @ b / norm(a) / norm(b))
    assert measured.relative_error == pytest.approx(norm(a - b) / norm(a))
    assert measured.sqnr_db == pytest.approx(20 * math.log10(norm(a) / norm(a - b)))
    assert measured.max_abs == pytest.approx(np.abs(a - b).max())


def test_zeros_against_zeros_are_alike_and_against_others_are_not() -> None:
    zeros, ones = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    assert sums(zeros, zeros).cosine_similarity == 1.0
    assert sums(zeros, ones).cosine_similarity == 0.0
    assert sums(zeros, ones).relative_error == math.inf


def test_a_report_says_nothing_where_a_figure_is_infinite_and_counts_all_bytes() -> None:
    quality = Quality.of(sums(np.zeros((2, 8), np.float32), np.ones((2, 8), np.float32)), stored_bytes=10)
    assert quality.relative_error is None
    assert quality.bits_per_weight == 5.0
    assert Quality.of(ErrorSums(), 0).bits_per_weight == 0.0
