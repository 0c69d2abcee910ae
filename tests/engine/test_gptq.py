"""GPTQ and the descent after it, by the exact error of a layer's output."""

from __future__ import annotations

from itertools import product
from typing import Any

import array_api_strict
import numpy as np
import pytest

from bench.published_gptq import as_published
from service.engine.backends.base import Backend
from service.engine.inputs import LayerInputs
from service.engine.methods.base import Method, Solution
from service.engine.methods.coded import Coded
from service.engine.methods.gptq import Gptq, trial_rows
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.schemes.base import Scheme
from service.engine.schemes.codebook import CodebookScheme
from service.engine.schemes.integer import IntegerScheme
from tests.contract.cases import all_schemes, backend, usable_backends
from tests.engine.formats.outputs import label
from tests.golden.cases import parts

BACKENDS = pytest.mark.parametrize("id_", usable_backends())


def fed(rng: np.random.Generator, cols: int) -> LayerInputs:
    """Inputs as layers have them: correlated columns of very different sizes."""
    mixed = rng.standard_normal((cols // 2, cols)) + 0.3 * rng.standard_normal((1, cols))
    x = rng.standard_t(5, (4 * cols, cols // 2)) @ mixed + 0.5 * rng.standard_normal((4 * cols, cols))
    x *= np.exp(rng.standard_normal(cols))
    return LayerInputs(cols, gram=(x.T @ x / len(x)).astype(np.float32))


def weights(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Heavy-tailed, as trained ones."""
    return (rng.standard_t(5, (rows, cols)) * 0.05).astype(np.float32)


def values_of(scheme: Scheme, found: Solution) -> np.ndarray:
    """What a solution stands for, float64."""
    return Coded.of(np, scheme, found).values.astype(np.float64)


def row_errors(x: np.ndarray, scheme: Scheme, inputs: LayerInputs, found: Solution) -> np.ndarray:
    """Squared output error of each row over that of its output, in float64."""
    gram = inputs.gram.astype(np.float64)  # type: ignore[union-attr]
    error = x - values_of(scheme, found)
    return ((error @ gram) * error).sum(1) / ((x @ gram) * x).sum(1)


@pytest.mark.parametrize(("bits", "to_minmax", "to_mse", "to_published"), [(2, 0.2, 0.3, 0.6), (4, 0.2, 0.3, 0.8)])
def test_calibration_gains_much_over_mse_and_the_descent_over_gptq_as_published(
    bits: int, to_minmax: float, to_mse: float, to_published: float, rng: np.random.Generator
) -> None:
    scheme = IntegerScheme(bits=bits, group_size=32)
    for cols in (96, 80):
        inputs, x = fed(rng, cols), weights(rng, 24, cols)
        unaware = Mse().solve(np, x, scheme, LayerInputs(cols))
        found = {m.id: m.solve(np, x, scheme, inputs) for m in (MinMax(), Mse(), Gptq())}
        errors = {id_: row_errors(x, scheme, inputs, solution) for id_, solution in found.items()}
        published = row_errors(x, scheme, inputs, as_published(x, scheme, inputs)[0])
        assert errors["mse"].sum() < 0.95 * row_errors(x, scheme, inputs, unaware).sum()
        assert errors["gptq"].sum() < to_minmax * errors["minmax"].sum()
        assert errors["gptq"].sum() < to_mse * errors["mse"].sum()
        assert errors["gptq"].sum() < to_published * published.sum()
        assert (errors["gptq"] <= errors["mse"]).all()


def kinds() -> list[Scheme]:
    """One scheme of each kind, and integers of few and many bits in short and long groups."""
    found = {(s.id, s.granularity): s for s in all_schemes() if s.granularity != "tensor" and not s.has_tensor_scale}
    picked = [s for (id_, _), s in found.items() if not id_.startswith("int") or id_ in ("int2", "int4_nested")]
    return [*picked, IntegerScheme(bits=8, is_symmetric=True, group_size=64), IntegerScheme(bits=3, group_size=256)]


@pytest.mark.parametrize("scheme", kinds(), ids=label)
def test_every_scheme_gains(scheme: Scheme, rng: np.random.Generator) -> None:
    inputs, x = fed(rng, 272), weights(rng, 6, 272)
    found = Gptq(sweeps=1, dampings=(1e-3,)).solve(np, x, scheme, inputs)
    mse = Mse().solve(np, x, scheme, inputs)
    assert [a.shape for a in (found.codes, found.scale, found.zero)] == [
        a.shape for a in (mse.codes, mse.scale, mse.zero)
    ]
    if scheme.free == scheme:
        assert np.array_equal(found.scale, scheme.store_scale(np, found.scale))
        assert np.array_equal(found.zero, np.clip(np.rint(found.zero), 0, (1 << scheme.bits) - 1))
    assert row_errors(x, scheme, inputs, found).sum() < 0.7 * row_errors(x, scheme, inputs, mse).sum()


def test_two_columns_of_two_bits_come_near_the_best_that_there_is(rng: np.random.Generator) -> None:
    scheme = IntegerScheme(bits=2, group_size=16, scale_dtype="F32")
    x = rng.standard_normal((200, 2)).astype(np.float32)
    gram = np.array([[1.0, 0.9], [0.9, 1.5]], np.float32)
    mine = row_errors(x, scheme, LayerInputs(2, gram=gram), Gptq().solve(np, x, scheme, LayerInputs(2, gram=gram)))
    best = np.full(len(x), np.inf)
    size = ((x @ gram) * x).sum(1)
    for levels in product(range(-3, 4), repeat=2):
        v = np.array(levels, np.float64)
        if not v.any() or v.max() - v.min() > 3 or max(v.max(), -v.min()) > 3:
            continue
        scale = np.maximum((x @ gram @ v) / (v @ gram @ v), 0)
        error = x - scale[:, None] * v
        best = np.minimum(best, ((error @ gram) * error).sum(1) / size)
    assert (mine >= best - 1e-6).all(), "nothing is better than the best"
    assert mine.mean() < best.mean() + 0.01


def test_columns_that_are_never_fed_keep_their_weights(rng: np.random.Generator) -> None:
    scheme = IntegerScheme(bits=4, group_size=32)
    inputs, x = fed(rng, 64), weights(rng, 8, 64)
    dead = np.arange(64) % 4 == 1
    gram = np.where(dead[:, None] | dead[None, :], 0, inputs.gram)
    found = Gptq().solve(np, x, scheme, LayerInputs(64, gram=gram))
    where = np.arange(64) // 32
    nearest = scheme.encode(np, x[..., None], found.scale[:, where], found.zero[:, where])[..., 0]
    # The last fit of a scale may leave a code that was next to its weight on the one before.
    steps = np.abs(found.codes[:, dead].astype(int) - nearest[:, dead].astype(int))
    assert steps.max() <= 1
    assert steps.mean() < 0.05
    for nothing in (np.zeros_like(gram), np.ones_like(gram)):
        with np.errstate(all="ignore"):
            plain = Gptq().solve(np, x, scheme, LayerInputs(64, gram=nothing))
        assert np.isfinite(values_of(scheme, plain)).all()


def quantized(one: Backend, x: np.ndarray, scheme: Scheme, method: Method, inputs: LayerInputs) -> dict[str, Any]:
    """The stored parts of what a backend makes of x, with fresh inputs so that nothing is shared."""
    return parts(one.quantize(x, scheme, method, None, LayerInputs(inputs.cols, gram=inputs.gram)))


@BACKENDS
def test_rows_are_solved_alike_in_any_block_by_any_number_of_threads(id_: str, rng: np.random.Generator) -> None:
    inputs, x = fed(rng, 160), weights(rng, 72, 160)
    for scheme in (IntegerScheme(bits=3, group_size=64), CodebookScheme(group_size=32)):
        whole = quantized(backend(id_), x, scheme, Gptq(sweeps=1), inputs)
        threaded = quantized(backend(id_, threads=3), x, scheme, Gptq(sweeps=1), inputs)
        cut = [slice(0, 8), slice(8, 56), slice(56, 72)]
        pieces = [quantized(backend(id_), x[rows], scheme, Gptq(sweeps=1), inputs) for rows in cut]
        for part, content in whole.items():
            assert np.array_equal(threaded[part], content), part
            assert np.array_equal(np.concatenate([piece[part] for piece in pieces]), content), part


@pytest.mark.parametrize("id_", [id_ for id_ in usable_backends() if id_ != "reference"])
def test_a_backend_comes_as_close_as_the_reference(id_: str, rng: np.random.Generator) -> None:
    # Rows whose descents part at a rounding end apart, above as often as below: of so many rows it does not show.
    inputs, x = fed(rng, 200), weights(rng, 800, 200)
    method = Gptq(sweeps=2, dampings=(1e-3,))
    for scheme in (IntegerScheme(bits=2, group_size=32), IntegerScheme(granularity="channel", group_size=None)):
        mine, theirs, mse = (
            backend(name).quantize(x, scheme, one, None, inputs).errors
            for name, one in ((id_, method), ("reference", method), ("reference", Mse()))
        )
        assert mine.out_dd <= 1.01 * theirs.out_dd
        assert mine.out_dd < 0.5 * mse.out_dd


@BACKENDS
def test_the_damping_is_the_one_with_which_the_walk_errs_least_on_the_trial_rows(
    id_: str, rng: np.random.Generator
) -> None:
    x = trial_rows(120)
    for scheme, _ in product((IntegerScheme(bits=2, group_size=32), IntegerScheme(granularity="channel")), range(2)):
        inputs, dampings = fed(rng, 120), Gptq().dampings
        errors = [
            backend(id_).quantize(x, scheme, Gptq(sweeps=0, dampings=tried), None, inputs).errors.out_dd
            for tried in (dampings, *((damping,) for damping in dampings))
        ]
        assert errors[0] == pytest.approx(min(errors[1:]), rel=1e-6)


def test_the_strictest_library_solves_what_numpy_solves(rng: np.random.Generator) -> None:
    inputs, x = fed(rng, 48), weights(rng, 6, 48)
    for scheme in (IntegerScheme(bits=3, group_size=32, scale_dtype="F32"), CodebookScheme(scale_dtype="F32")):
        method = Gptq(sweeps=1, dampings=(1e-3,))
        expected = method.solve(np, x, scheme, inputs)
        found = method.solve(array_api_strict, array_api_strict.asarray(x), scheme, inputs)
        for name in ("codes", "scale", "zero"):
            assert np.array_equal(np.asarray(getattr(found, name)), getattr(expected, name)), name
