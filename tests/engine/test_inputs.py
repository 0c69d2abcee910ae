"""What is known of a layer's inputs, and what becomes of its output."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from service.engine.backends.cpu import CpuBackend
from service.engine.backends.output_error import with_output
from service.engine.backends.reference import ReferenceBackend
from service.engine.inputs import LayerInputs
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.metrics import ErrorSums, OutputQuality
from service.engine.schemes.integer import IntegerScheme
from tests.engine.calibrations import gram, samples
from tests.engine.helpers import normal


def inputs_of(fed: np.ndarray) -> LayerInputs:
    """What calibration with these samples says."""
    return LayerInputs(fed.shape[1], gram=gram(fed))


def weighted(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Squared error in which each column counts as much as its weight."""
    return float((((x - y).astype(np.float64) ** 2) * weights).sum())


@pytest.mark.parametrize("error", [0.3, 1e-4])
def test_the_output_error_from_the_gram_matrix_is_that_of_running_the_layer(error: float) -> None:
    x, fed = normal(70, 96), samples(500, 96)
    y = x + np.float32(error) * normal(70, 96, seed=3)
    measured = with_output(ErrorSums(), x, y, inputs_of(fed).gram)
    before, after = fed.astype(np.float64) @ x.T, fed.astype(np.float64) @ y.T.astype(np.float64)
    d = fed.astype(np.float64) @ (x - y).T.astype(np.float64)
    assert measured.out_xx == pytest.approx((before**2).sum() / len(fed), rel=1e-5)
    assert measured.out_yy == pytest.approx((after**2).sum() / len(fed), rel=1e-5)
    assert measured.out_xy == pytest.approx((before * after).sum() / len(fed), rel=1e-5)
    assert measured.out_dd == pytest.approx((d**2).sum() / len(fed), rel=1e-5)
    assert measured.output_relative_error == pytest.approx(np.linalg.norm(d) / np.linalg.norm(before), rel=1e-5)


@pytest.mark.parametrize("backend", [ReferenceBackend(), CpuBackend()], ids=lambda b: b.id)
@pytest.mark.parametrize("method", [MinMax(), Mse()], ids=lambda m: m.id)
def test_errors_tell_of_the_output_where_a_gram_matrix_is_at_hand(backend, method) -> None:
    x, fed, scheme = normal(64, 96), samples(400, 96), IntegerScheme(bits=3, group_size=32)
    q = backend.quantize(x, scheme, method, inputs=inputs_of(fed))
    lost = fed.astype(np.float64) @ (x - backend.dequantize(q)).T.astype(np.float64)
    assert q.errors.out_dd == pytest.approx((lost**2).sum() / len(fed), rel=1e-5)
    assert q.errors.sum_dd == pytest.approx(backend.compare(x, backend.dequantize(q)).sum_dd)
    without = backend.quantize(x, scheme, method, inputs=LayerInputs(96, mean_square=np.ones(96, np.float32)))
    assert not without.errors.has_output
    assert OutputQuality.of(without.errors) is None


@pytest.mark.parametrize("backend", [ReferenceBackend(), CpuBackend()], ids=lambda b: b.id)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_with_weights_has_less_weighted_error_than_without(backend, bits, symmetric) -> None:
    x, inputs = normal(64, 256), inputs_of(samples(400, 256))
    scheme = IntegerScheme(bits=bits, group_size=64, is_symmetric=symmetric)
    plain, weighed = (backend.dequantize(backend.quantize(x, scheme, Mse(), inputs=i)) for i in (None, inputs))
    assert weighted(x, weighed, inputs.mean_square) < 0.97 * weighted(x, plain, inputs.mean_square)


@pytest.mark.parametrize("backend", [ReferenceBackend(), CpuBackend()], ids=lambda b: b.id)
def test_minmax_has_the_same_bytes_with_calibration(backend) -> None:
    x, scheme = normal(8, 96), IntegerScheme(group_size=32)
    plain, calibrated = (backend.quantize(x, scheme, MinMax(), inputs=i) for i in (None, inputs_of(samples(50, 96))))
    assert np.array_equal(plain.packed, calibrated.packed)
    assert np.array_equal(plain.scale, calibrated.scale)


@pytest.mark.parametrize("backend", [ReferenceBackend(), CpuBackend()], ids=lambda b: b.id)
def test_columns_that_are_never_fed_keep_their_size(backend) -> None:
    fed = samples(50, 96)
    fed[:, :32] = 0.0
    x = normal(8, 96)
    q = backend.quantize(x, IntegerScheme(bits=4, group_size=32), Mse(), inputs=inputs_of(fed))
    kept = backend.dequantize(q)
    assert np.linalg.norm(kept[:, :32] - x[:, :32]) < 0.2 * np.linalg.norm(x[:, :32])


def test_the_error_of_the_output_adds_up_over_rows() -> None:
    x, inputs, backend = normal(64, 96), inputs_of(samples(100, 96)), ReferenceBackend()
    scheme = IntegerScheme(group_size=32)
    whole = backend.quantize(x, scheme, MinMax(), inputs=inputs).errors
    parts = [
        backend.quantize(x[rows], scheme, MinMax(), inputs=inputs).errors for rows in (slice(0, 24), slice(24, 64))
    ]
    assert dataclasses.astuple(parts[0] + parts[1]) == pytest.approx(dataclasses.astuple(whole), rel=1e-6)


def test_weights_that_are_not_finite_have_no_output() -> None:
    x = normal(64, 96)
    x[3, 5] = np.nan
    for backend in (ReferenceBackend(), CpuBackend()):
        for method in (MinMax(), Mse()):
            errors = backend.quantize(x, IntegerScheme(), method, inputs=inputs_of(samples(50, 96))).errors
            assert not errors.finite
            assert not errors.has_output


def test_the_diagonal_of_the_gram_matrix_is_the_mean_square() -> None:
    fed = samples(50, 8)
    assert inputs_of(fed).mean_square == pytest.approx((fed**2).mean(0), rel=1e-5)


def test_a_layer_that_is_never_fed_weighs_all_columns_alike() -> None:
    assert np.array_equal(LayerInputs(4, mean_square=np.zeros(4, np.float32)).weights, np.ones(4))


def test_what_is_derived_is_derived_once_by_any_number_of_threads() -> None:
    inputs, made = LayerInputs(4), []

    def make() -> int:
        made.append(1)
        return len(made)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: inputs.once("key", make), range(64))) == {1}
    assert inputs.once("another", make) == 2
