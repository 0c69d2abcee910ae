"""How scale and zero point are found, beyond what holds for every method (`tests/contract/test_methods.py`)."""

from __future__ import annotations

import numpy as np

from service.engine.methods.hqq import Hqq
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.schemes.base import Scheme
from service.engine.schemes.integer import IntegerScheme


def errors(x: np.ndarray, scheme: Scheme, method, weights: np.ndarray | None = None) -> np.ndarray:
    """(Weighted) squared error of each group x (n, g), in float64."""
    scale, zero = method.find(np, x, scheme, weights)
    decoded = scheme.decode(np, scheme.encode(np, x, scale, zero), scale, zero)
    squares = (x.astype(np.float64) - decoded) ** 2
    return (squares if weights is None else squares * weights).sum(-1)


def test_mse_gains_much_where_bits_are_few(rng) -> None:
    x = rng.standard_normal((200, 64)).astype(np.float32)
    for bits, share in ((2, 0.75), (3, 0.9), (4, 0.98)):
        scheme = IntegerScheme(bits=bits)
        assert errors(x, scheme, Mse()).sum() < share * errors(x, scheme, MinMax()).sum()


def test_weights_move_the_grid_to_where_they_are(rng) -> None:
    x = rng.standard_normal((100, 64)).astype(np.float32)
    weights = np.where(np.arange(64) < 16, 100.0, 0.01).astype(np.float32)
    scheme = IntegerScheme(bits=3)
    scale, zero = Mse().find(np, x, scheme)
    unaware = ((x - scheme.decode(np, scheme.encode(np, x, scale, zero), scale, zero)) ** 2 * weights).sum()
    assert errors(x, scheme, Mse(), weights).sum() < unaware


def test_elements_of_no_weight_do_not_stretch_the_range() -> None:
    x = np.array([[-1.0, 0.5, 1.0, 1000.0]], np.float32)
    weights = np.array([[1.0, 1.0, 1.0, 0.0]], np.float32)
    for method in (MinMax(), Mse()):
        scale, _ = method.find(np, x, IntegerScheme(), weights)
        assert scale[0] < 0.2


def test_symmetric_schemes_start_from_equal_clips_only() -> None:
    assert len(Mse().starts(IntegerScheme())) == 16
    assert Mse().starts(IntegerScheme(is_symmetric=True)) == [(c, c) for c in Mse().clips]


def test_without_starts_or_iterations_mse_is_minmax(rng) -> None:
    x = rng.standard_normal((50, 32)).astype(np.float32)
    idle = Mse(clips=(1.0,), max_iterations=0)
    for mine, theirs in zip(idle.find(np, x, IntegerScheme()), MinMax().find(np, x, IntegerScheme()), strict=True):
        assert np.array_equal(mine, theirs)


def test_hqq_heeds_what_is_usual_more_than_mse_does_and_outliers_less(rng) -> None:
    x = rng.standard_t(3, (400, 64)).astype(np.float32)
    for bits in (2, 3, 4):
        scheme = IntegerScheme(bits=bits)
        norms = {}
        for method in (MinMax(), Mse(), Hqq()):
            scale, zero = method.find(np, x, scheme)
            error = np.abs(x - scheme.decode(np, scheme.encode(np, x, scale, zero), scale, zero))
            norms[method.id] = float((error**0.5).sum())
        assert norms["hqq"] < 0.99 * norms["minmax"]
        assert norms["hqq"] < 0.999 * norms["mse"]


def test_hqq_gains_where_bits_are_few_and_without_iterations_is_minmax(rng) -> None:
    x = rng.standard_normal((200, 64)).astype(np.float32)
    for symmetric in (False, True):
        scheme = IntegerScheme(bits=3, is_symmetric=symmetric)
        idle = errors(x, scheme, Hqq(max_iterations=0)).sum()
        assert idle == errors(x, scheme, MinMax()).sum()
        assert errors(x, scheme, Hqq()).sum() < 0.95 * idle
