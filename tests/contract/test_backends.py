"""What holds for every backend that can run here, looked up as a user does."""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np
import pytest

from service.engine.backends.base import Backend, Grid
from service.engine.backends.registry import PREFERENCE, backends, choose_backend
from service.engine.inputs import LayerInputs
from service.engine.methods.base import Method
from service.engine.methods.registry import methods
from service.engine.metrics import ErrorSums
from service.engine.schemes.base import Scheme
from service.errors import InvalidConfig
from tests.contract.cases import DTYPES, all_schemes, backend, usable_backends
from tests.engine.formats.outputs import label
from tests.golden.cases import parts

BACKENDS = pytest.mark.parametrize("id_", usable_backends())
OTHERS = pytest.mark.parametrize("id_", [id_ for id_ in usable_backends() if id_ != "reference"])
SCHEMES = pytest.mark.parametrize("scheme", list(all_schemes()), ids=label)
#: Those that compute; others scale weights, or take a part of them, for one of these.
METHODS = pytest.mark.parametrize(
    "method", [m for cls in methods().values() if (m := cls()).quantizes_as == m], ids=lambda m: m.id
)
REFERENCE = backend("reference")
MINMAX = methods()["minmax"]()


def matrix(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Weights as trained ones are, with a row of zeros."""
    x = rng.standard_normal((rows, cols)).astype(np.float32) * np.float32(0.05)
    x[1] = 0.0
    return x


def grid_of(one: Backend, x: np.ndarray, scheme: Scheme, method: Method) -> Grid | None:
    """The grid that `quantize` wants where a whole tensor has one."""
    return one.tensor_grid(one.observe(x), scheme, method) if scheme.takes_pass else None


def assert_close(mine: ErrorSums, theirs: ErrorSums) -> None:
    """The same sums but for rounding."""
    assert (mine.count, mine.finite) == (theirs.count, theirs.finite)
    for name in ("sum_xx", "sum_yy", "sum_xy", "sum_dd", "max_abs"):
        assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-5), name


@pytest.mark.parametrize("cls", backends().values(), ids=lambda c: c.id)
def test_a_backend_says_what_it_is_or_why_it_cannot_run(cls: type[Backend]) -> None:
    assert inspect.getmodule(cls).__name__.endswith(f".{cls.id}")  # type: ignore[union-attr]
    assert cls.description
    assert cls.id in PREFERENCE, "`auto` has to know when to take it"
    reason = cls.unavailable()
    if reason is None:
        assert choose_backend(cls.id) == cls.id
        return
    with pytest.raises(InvalidConfig, match=cls.id) as refused:
        choose_backend(cls.id)
    assert reason in refused.value.detail


@BACKENDS
@SCHEMES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minmax_gives_the_bytes_of_the_reference(
    id_: str, scheme: Scheme, dtype: np.dtype, rng: np.random.Generator
) -> None:
    x = matrix(rng, 9, 200).astype(dtype)
    mine, theirs = (
        one.quantize(x, scheme, MINMAX, grid_of(one, x, scheme, MINMAX)) for one in (backend(id_), REFERENCE)
    )
    made, expected = parts(mine), parts(theirs)
    assert made.keys() == expected.keys()
    for part, content in expected.items():
        assert np.array_equal(made[part], content), part
    assert_close(mine.errors, theirs.errors)


@OTHERS
@SCHEMES
@pytest.mark.parametrize(
    "method", [m for cls in methods().values() if (m := cls()).quantizes_as == m and not m.needs], ids=lambda m: m.id
)
def test_a_method_comes_as_close_as_in_the_reference(
    id_: str, scheme: Scheme, method: Method, rng: np.random.Generator
) -> None:
    # Single descents part at a rounding and end apart, above as often as below: of so many groups it does not show.
    x = matrix(rng, 640, 160)
    grid = grid_of(REFERENCE, x, scheme, method)
    mine, theirs = (one.quantize(x, scheme, method, grid).errors for one in (backend(id_), REFERENCE))
    assert mine.sum_dd <= theirs.sum_dd * 1.001


@OTHERS
@SCHEMES
@pytest.mark.parametrize(
    ("rows", "cols", "dtype", "limit"), [(320, 160, np.float32, 1.001), (640, 150, ml_dtypes.bfloat16, 1.003)]
)
def test_a_weighted_search_comes_as_close_as_in_the_reference(
    id_: str, scheme: Scheme, rows: int, cols: int, dtype: np.dtype, limit: float, rng: np.random.Generator
) -> None:
    if scheme.granularity == "tensor":
        pytest.skip("a histogram knows no columns")
    # Numbers of few bits often lie midway between two codes, where rounding parts more descents than of float32.
    x, mse = matrix(rng, rows, cols).astype(dtype), methods()["mse"]()
    inputs = LayerInputs(cols, mean_square=rng.lognormal(0, 1, cols).astype(np.float32))
    errors = []
    for one in (backend(id_), REFERENCE):
        lost = x.astype(np.float64) - one.dequantize(one.quantize(x, scheme, mse, inputs=inputs))
        errors.append((lost**2 * inputs.weights).sum())
    assert errors[0] <= errors[1] * limit


@BACKENDS
@SCHEMES
def test_reading_back_gives_what_was_measured(id_: str, scheme: Scheme, rng: np.random.Generator) -> None:
    one, x = backend(id_), matrix(rng, 9, 200)
    q = one.quantize(x, scheme, MINMAX, grid_of(one, x, scheme, MINMAX))
    read = one.dequantize(q)
    assert (read.shape, read.dtype) == (x.shape, np.float32)
    assert np.array_equal(read, REFERENCE.dequantize(q))
    assert_close(one.compare(x, read), q.errors)
    assert_close(one.compare(x, read), REFERENCE.compare(x, read))


@BACKENDS
@SCHEMES
@METHODS
def test_rows_are_quantized_alike_in_any_block_by_any_number_of_threads(
    id_: str, scheme: Scheme, method: Method, rng: np.random.Generator
) -> None:
    step = scheme.row_multiple if scheme.granularity == "block" else 8
    x = matrix(rng, 3 * step, 160)
    grid = grid_of(REFERENCE, x, scheme, method)
    whole = parts(backend(id_).quantize(x, scheme, method, grid))
    threaded = parts(backend(id_, threads=3).quantize(x, scheme, method, grid))
    pieces = [parts(backend(id_).quantize(x[at * step :][:step], scheme, method, grid)) for at in range(3)]
    for part, content in whole.items():
        assert np.array_equal(threaded[part], content), part
        if part == "packed" or (scheme.granularity != "tensor" and part != "tensor_scale"):
            assert np.array_equal(np.concatenate([piece[part] for piece in pieces]), content), part


@BACKENDS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_noticed(id_: str, value: float, dtype: np.dtype, rng: np.random.Generator) -> None:
    one, x = backend(id_), matrix(rng, 40, 160).astype(dtype)
    assert one.observe(x).finite
    sick = x.copy()
    sick[33, 111] = value
    assert not one.observe(sick).finite
    assert not one.compare(sick, x).finite
    for scheme in all_schemes():
        grid = grid_of(REFERENCE, x, scheme, MINMAX)
        assert not one.quantize(sick, scheme, MINMAX, grid).errors.finite, scheme


@BACKENDS
@METHODS
def test_a_slice_is_of_one_size_whatever_the_machine(id_: str, method: Method) -> None:
    sizes = {backend(id_, threads).slice_bytes(method) for threads in (1, 3)}
    assert len(sizes) == 1
    assert sizes.pop() > 0
