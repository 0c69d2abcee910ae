"""The cuda backend against the reference, its kernels run by fibers: all of it but CuPy's part.

It says nothing about speed, nor about what a race would do.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.engine.backends.base import Grid
from service.engine.backends.cuda import CudaBackend
from service.engine.backends.reference import ReferenceBackend
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.metrics import ErrorSums
from service.engine.schemes.base import Scheme
from service.engine.schemes.codebook import NF4_MIDPOINTS, CodebookScheme
from service.engine.schemes.integer import IntegerScheme
from tests.contract.cases import all_schemes
from tests.engine.backends.fiber_device import FiberDevice
from tests.engine.backends.test_cpu import DTYPES, KINDS, assert_close, assert_same, schemes, values
from tests.engine.formats.outputs import label

CUDA, REFERENCE = CudaBackend(1, devices=[FiberDevice()]), ReferenceBackend()
#: Few columns, rows of whole vectors, and rows that end anywhere.
COLUMNS = st.one_of(st.integers(1, 300), st.integers(1, 20).map(lambda n: 32 * n), st.just(2085))
SHAPED = settings(max_examples=60, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])


SHAPES = st.lists(st.tuples(st.integers(1, 12), COLUMNS), min_size=1, max_size=9)


@settings(SHAPED, max_examples=12)
@given(schemes(), st.lists(st.sampled_from(DTYPES), min_size=9, max_size=9), SHAPES, st.integers(0, 2**32 - 1))
def test_many_small_tensors_get_what_each_of_them_would(scheme, dtypes, shapes, seed) -> None:
    xs = [values("normal", seed + i, *shape, dtypes[i]) for i, shape in enumerate(shapes)]
    for method in (MinMax(), Mse(clips=(1.0, 0.8), max_iterations=2)):
        for mine, x in zip(CUDA.quantize_many(xs, scheme, method), xs, strict=True):
            assert_same(mine, CUDA.quantize(x, scheme, method))
            assert mine.errors == pytest.approx(CUDA.quantize(x, scheme, method).errors)


def test_a_tensor_that_is_not_finite_is_the_only_one_of_many_that_is_said_to_be_so(rng) -> None:
    xs = [rng.standard_normal((3, 70)).astype(np.float32) for _ in range(40)]
    xs[17][2, 69] = np.nan
    found = CUDA.quantize_many(xs, IntegerScheme(), MinMax())
    assert [i for i, q in enumerate(found) if not q.errors.finite] == [17]


@SHAPED
@given(schemes(), st.sampled_from(DTYPES), KINDS, st.integers(1, 12), COLUMNS, st.integers(0, 2**32 - 1))
def test_minmax_gives_the_bytes_of_the_reference(scheme, dtype, kind, rows, cols, seed) -> None:
    x = values(kind, seed, rows, cols, dtype)
    assert_same(CUDA.quantize(x, scheme, MinMax()), REFERENCE.quantize(x, scheme, MinMax()))


@pytest.mark.parametrize("scheme", list(all_schemes()), ids=label)
def test_every_scheme_and_dtype_has_kernels_that_agree_with_the_reference(scheme: Scheme, rng) -> None:
    for dtype in DTYPES:
        for cols in (64, 203):
            x = values("normal", int(rng.integers(1 << 32)), 5, cols, dtype)
            grid = None
            if scheme.granularity == "tensor":
                grid = CUDA.tensor_grid(CUDA.observe(x), scheme, MinMax())
                assert grid == REFERENCE.tensor_grid(REFERENCE.observe(x), scheme, MinMax())
            expected = REFERENCE.quantize(x, scheme, MinMax(), grid)
            assert_same(CUDA.quantize(x, scheme, MinMax(), grid), expected)
            assert np.array_equal(CUDA.dequantize(expected), REFERENCE.dequantize(expected))


@pytest.mark.parametrize("bits", sorted(IntegerScheme.ids.values()))
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_error_of_mse_is_that_of_the_reference(bits: int, symmetric: bool, rng) -> None:
    scheme = IntegerScheme(bits=bits, is_symmetric=symmetric, group_size=32)
    for dtype in DTYPES:
        x = values("normal", int(rng.integers(1 << 32)), 16, 200, dtype)
        mine, theirs = CUDA.quantize(x, scheme, Mse()).errors, REFERENCE.quantize(x, scheme, Mse()).errors
        # Two descents that part at a rounding can end apart, which a few hundred groups do not even out.
        assert mine.sum_dd == pytest.approx(theirs.sum_dd, rel=1e-2)
        assert_close(mine, CUDA.compare(x, CUDA.dequantize(CUDA.quantize(x, scheme, Mse()))), 1e-5)


@pytest.mark.parametrize(
    "scheme",
    [IntegerScheme(granularity="channel"), CodebookScheme(), CodebookScheme(granularity="channel")],
    ids=label,
)
@pytest.mark.parametrize("cols", [48, 333])
def test_mse_searches_whole_rows_and_tables_as_well(scheme: Scheme, cols: int, rng) -> None:
    x = values("normal", int(rng.integers(1 << 32)), 4, cols, DTYPES[0])
    mine, theirs = CUDA.quantize(x, scheme, Mse()).errors, REFERENCE.quantize(x, scheme, Mse()).errors
    assert mine.sum_dd == pytest.approx(theirs.sum_dd, rel=3e-2)


@pytest.mark.parametrize(
    "method",
    [Mse(clips=(), max_iterations=3), Mse(clips=(0.9,)), Mse(clips=(1.0, 0.7), max_iterations=0)],
    ids=str,
)
def test_mse_takes_every_start_and_step_that_its_parameters_allow_and_no_other(method: Mse, rng) -> None:
    x = rng.standard_normal((9, 250)).astype(np.float32)
    mine, theirs = (one.quantize(x, IntegerScheme(bits=3), method) for one in (CUDA, REFERENCE))
    assert mine.errors.sum_dd == pytest.approx(theirs.errors.sum_dd, rel=1e-4)
    assert np.mean(mine.scale == theirs.scale) > 0.9


@settings(SHAPED, max_examples=30)
@given(st.sampled_from(DTYPES), st.sampled_from(DTYPES), KINDS, st.integers(1, 12), COLUMNS, st.integers(0, 2**32 - 1))
def test_compare_gives_the_sums_of_the_reference(x_dtype, y_dtype, kind, rows, cols, seed) -> None:
    x, y = values(kind, seed, rows, cols, x_dtype), values("normal", seed + 1, rows, cols, y_dtype)
    assert_close(CUDA.compare(x, y), REFERENCE.compare(x, y))


@settings(SHAPED, max_examples=15)
@given(st.sampled_from(DTYPES), KINDS, st.integers(1, 9), COLUMNS, st.integers(0, 2**32 - 1))
def test_observe_counts_as_the_reference_counts(dtype, kind, rows, cols, seed) -> None:
    x = values(kind, seed, rows, cols, dtype)
    mine, theirs = CUDA.observe(x), REFERENCE.observe(x)
    assert np.array_equal(mine.counts, theirs.counts)
    assert (mine.lo, mine.hi, mine.finite) == (theirs.lo, theirs.hi, theirs.finite)
    np.testing.assert_allclose(mine.sums, theirs.sums, rtol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_that_is_not_finite_is_noticed_wherever_it_is(bad: float, dtype: np.dtype, rng) -> None:
    for at in (0, 333, 1000):
        x = rng.standard_normal((3, 667)).astype(dtype)
        x.reshape(-1)[at] = bad
        for scheme in (IntegerScheme(), IntegerScheme(is_symmetric=True, granularity="channel"), CodebookScheme()):
            assert not CUDA.quantize(x, scheme, MinMax()).errors.finite
        assert not CUDA.quantize(x, IntegerScheme(), Mse()).errors.finite
        assert not CUDA.compare(x, np.zeros_like(x)).finite
        assert not CUDA.observe(x).finite


def test_values_beside_the_midpoints_of_nf4_go_where_the_reference_sends_them() -> None:
    near = np.concatenate([np.nextafter(NF4_MIDPOINTS, d, dtype=np.float32) for d in (-2, 2)])
    x = np.concatenate([[1.0], near, NF4_MIDPOINTS, np.linspace(-1, 1, 10001)]).astype(np.float32)[None]
    grid = Grid(np.float32(1.0), np.float32(0.0))
    scheme = CodebookScheme(granularity="tensor")
    assert_same(CUDA.quantize(x, scheme, MinMax(), grid), REFERENCE.quantize(x, scheme, MinMax(), grid))


def test_what_is_cut_into_pieces_is_put_together_again(rng) -> None:
    x = rng.standard_normal((3000, 800)).astype(np.float32)  # more than PIECE_BYTES
    q = CUDA.quantize(x, IntegerScheme(), MinMax())
    assert_same(q, REFERENCE.quantize(x, IntegerScheme(), MinMax()))
    assert np.array_equal(CUDA.dequantize(q), REFERENCE.dequantize(q))


def test_no_rows_are_no_work() -> None:
    x = np.zeros((0, 128), np.float32)
    assert CUDA.compare(x, x) == ErrorSums()


#: Every kind of kernel once, in a process in which the sanitizer watches all memory.
WATCHED = """
import numpy as np
from service.engine.backends.cuda import CudaBackend
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.schemes.codebook import CodebookScheme
from service.engine.schemes.integer import IntegerScheme
from tests.engine.backends.fiber_device import FiberDevice, SANITIZE
from tests.engine.backends.test_cpu import DTYPES

cuda, rng = CudaBackend(1, devices=[FiberDevice(options=tuple(SANITIZE))]), np.random.default_rng(0)
for dtype in DTYPES[:3]:
    x = rng.standard_normal((3, 203)).astype(dtype)
    for bits in (2, 3, 4, 5, 6, 8):
        cuda.dequantize(cuda.quantize(x, IntegerScheme(bits=bits, group_size=16), MinMax()))
    cuda.dequantize(cuda.quantize(x, CodebookScheme(), MinMax()))
    cuda.quantize(x, IntegerScheme(granularity="channel"), MinMax())
    cuda.quantize(x[:1], IntegerScheme(), Mse(clips=(0.9,)))
    cuda.quantize(x[:1], CodebookScheme(granularity="channel"), Mse(clips=(0.9,), max_iterations=1))
    cuda.quantize_many([x, x[:1], x[:, :33]], IntegerScheme(bits=3), MinMax())
    cuda.quantize_many([x[:1], x[:1, :33]], IntegerScheme(), Mse(clips=(0.9,)))
    cuda.quantize_many([x, x[:1]], IntegerScheme(granularity="channel"), MinMax())
    cuda.quantize_many([x[:1], x[1:2, :33]], CodebookScheme(granularity="channel"), Mse(clips=(0.9,), max_iterations=1))
    cuda.observe(x)
    cuda.compare(x, x)
print("all ran")
"""


def sanitized(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with the address sanitizer loaded before everything else."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {"LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280)


def test_the_address_sanitizer_finds_no_access_outside_of_an_array() -> None:
    done = sanitized(WATCHED)
    assert done.stdout.endswith("all ran\n"), done.stderr[-3000:]
    assert "AddressSanitizer" not in done.stderr, done.stderr[-3000:]


BEYOND = """
import numpy as np
from service.engine.backends.work import Launch, Work
from tests.engine.backends.fiber_device import FiberDevice, SANITIZE

nine = np.ones(9, np.float32)
launch, numbers = Launch("measure", "compare_f32_f32", 1), {"rows": 1, "cols": 100_000}
work = Work((launch,), {"x": nine, "y": nine}, {"sums": np.empty((1, 5))}, numbers)
FiberDevice(options=tuple(SANITIZE)).submit(work)
"""


def test_the_address_sanitizer_would_have_found_one() -> None:
    assert "AddressSanitizer: heap-" in sanitized(BEYOND).stderr
