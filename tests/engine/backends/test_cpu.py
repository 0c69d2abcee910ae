"""The cpu backend against the reference: equal bytes for `minmax`, equal errors for `mse`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.engine.backends.base import Grid
from service.engine.backends.cpu import INLINE_ELEMENTS, STREAMED_BYTES, CpuBackend
from service.engine.backends.reference import ReferenceBackend
from service.engine.inputs import LayerInputs
from service.engine.methods.base import Method
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.metrics import ErrorSums
from service.engine.schemes.base import Scheme
from service.engine.schemes.codebook import NF4_MIDPOINTS, CodebookScheme
from service.engine.schemes.float8 import Float8E4M3, Float8E5M2
from service.engine.schemes.integer import IntegerScheme
from service.engine.schemes.microscaling import Fp4, Mx, NvFp4
from service.engine.schemes.minifloat import MiniFloatScheme
from service.engine.schemes.nested import NestedScheme
from service.engine.tensors import QuantizedRows

DTYPES = [np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)]
CPU, REFERENCE = CpuBackend(2), ReferenceBackend()

#: Rows that end anywhere, and rows of whole vectors, which other kernels take.
COLUMNS = st.one_of(
    st.integers(1, 300),
    st.integers(1, 20).map(lambda n: 32 * n),
    st.sampled_from([1023, 4096, 4097, 4128, 5000, 8209, 8832]),
)
KINDS = st.sampled_from(["normal", "sparse", "equal", "positive", "tiny", "subnormal", "huge", "outlier", "zeros"])
FLOATS: list[MiniFloatScheme] = [
    *(cls(granularity=granularity) for cls in (Float8E4M3, Float8E5M2) for granularity in ("channel", "block")),
    *(Fp4(group_size=size) for size in (16, 64)), Fp4(granularity="channel", group_size=None, scale_dtype="BF16"),
    Mx(bits=4), Mx(bits=8), NvFp4(), NvFp4(tensor_scale=300.0),
]  # fmt: skip
SHAPED = settings(max_examples=200, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    """Any scheme that has a kernel, per group, channel or block."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(FLOATS))
    granularity = draw(st.sampled_from(["group", "channel"]))
    common = {
        "granularity": granularity,
        "group_size": draw(st.sampled_from([16, 32, 64, 128, 256])) if granularity == "group" else None,
        "scale_dtype": draw(st.sampled_from(["F32", "F16", "BF16"])),
    }
    if draw(st.integers(0, 6)) == 0:
        return CodebookScheme(**common)
    if draw(st.integers(0, 6)) == 0:
        small = {"granularity": "group", "group_size": draw(st.sampled_from([16, 32]))}
        return NestedScheme(bits=draw(st.sampled_from([2, 3, 4, 5, 6])), **common | small)
    return IntegerScheme(bits=draw(st.sampled_from([2, 3, 4, 5, 6, 8])), is_symmetric=draw(st.booleans()), **common)


def values(kind: str, seed: int, rows: int, cols: int, dtype: np.dtype) -> np.ndarray:
    """Weights that are hard in one way or another, all finite."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols))
    if kind == "sparse":
        x[rng.random(x.shape) < 0.9] = -0.0
    elif kind == "equal":
        x = np.round(x * 2) / 2
    elif kind == "positive":
        x = np.abs(x) + 3
    elif kind == "outlier":
        x[rng.random(x.shape) < 0.01] *= 1e4
    elif kind == "zeros":
        x = np.where(rng.random((rows, 1)) < 0.5, x, 0.0)
    limits = ml_dtypes.finfo(dtype if dtype.itemsize < 4 else np.dtype(np.float32))
    x *= {"tiny": float(limits.smallest_normal) * 8, "subnormal": float(limits.smallest_subnormal) * 5}.get(kind, 1.0)
    if kind == "huge":
        x *= float(limits.max) / 16
    bound = float(limits.max)
    return np.clip(x, -bound, bound).astype(dtype)


def assert_same(mine: QuantizedRows, theirs: QuantizedRows) -> None:
    """Equal to the bit, and as far from the original."""
    assert np.array_equal(mine.packed, theirs.packed)
    assert mine.scale.dtype == theirs.scale.dtype
    assert mine.scale.shape == theirs.scale.shape
    assert mine.scale.tobytes() == theirs.scale.tobytes()
    assert (mine.zero_point is None) == (theirs.zero_point is None)
    if mine.zero_point is not None and theirs.zero_point is not None:
        assert np.array_equal(mine.zero_point, theirs.zero_point)
    assert_close(mine.errors, theirs.errors)


def assert_close(mine: ErrorSums, theirs: ErrorSums, tolerance: float = 1e-6) -> None:
    """The same sums but for rounding."""
    assert (mine.count, mine.finite) == (theirs.count, theirs.finite)
    for name in ("sum_xx", "sum_yy", "sum_dd"):
        assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=tolerance, abs=1e-15 * theirs.sum_xx)
    # It may be made of the others, so the largest of them bounds its rounding.
    largest = max(theirs.sum_xx, theirs.sum_yy)
    assert mine.sum_xy == pytest.approx(theirs.sum_xy, rel=tolerance, abs=tolerance * largest)
    assert mine.max_abs == pytest.approx(theirs.max_abs, rel=tolerance)


@SHAPED
@given(schemes(), st.sampled_from(DTYPES), KINDS, st.integers(1, 40), COLUMNS, st.integers(0, 2**32 - 1))
@example(IntegerScheme(bits=2, group_size=16, scale_dtype="F32"), DTYPES[0], "subnormal", 1, 1, 0)
def test_minmax_gives_the_bytes_of_the_reference(scheme, dtype, kind, rows, cols, seed) -> None:
    x = values(kind, seed, rows, cols, dtype)
    assert_same(CPU.quantize(x, scheme, MinMax()), REFERENCE.quantize(x, scheme, MinMax()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [32, 544, 4128, 4160])
def test_groups_of_half_a_pair_of_vectors_have_the_bytes_of_the_reference(cols: int, dtype: np.dtype, rng) -> None:
    x = values("outlier", int(rng.integers(1 << 32)), 5, cols, dtype)
    for scheme in (*(IntegerScheme(bits=bits, group_size=16) for bits in (3, 4, 8)), CodebookScheme(group_size=16)):
        assert_same(CPU.quantize(x, scheme, MinMax()), REFERENCE.quantize(x, scheme, MinMax()))


SMALL_SHAPES = st.lists(st.tuples(st.integers(1, 40), COLUMNS), min_size=1, max_size=3)


@settings(SHAPED, max_examples=60)
@given(
    schemes(), st.sampled_from(DTYPES), SMALL_SHAPES, st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.sampled_from(["copies", "adjacent", "turned"]), st.integers(0, 2**32 - 1),
)  # fmt: skip
@example(IntegerScheme(group_size=32), DTYPES[0], [(64, 1024), (64, 1056)], [0, 1] * 4, "adjacent", 0)
def test_many_small_tensors_get_to_the_bit_what_each_of_them_would(scheme, dtype, shapes, order, lie, seed) -> None:
    chosen = [shapes[i % len(shapes)] for i in order]
    xs = [values("normal", seed + i, *shape, dtype) for i, shape in enumerate(chosen)]
    if lie == "adjacent":
        together = np.concatenate([x.reshape(-1).view(np.uint8) for x in xs])
        ends = np.cumsum([x.nbytes for x in xs])
        pieces = zip(np.split(together, ends[:-1]), xs, strict=True)
        xs = [piece.view(dtype).reshape(x.shape) for piece, x in pieces]
    elif lie == "turned":
        xs = [np.asfortranarray(x) for x in xs]
    xs[0][-1, -1] = np.nan if seed % 3 == 0 else 1.0
    for method in (MinMax(), Mse(clips=(1.0, 0.8), max_iterations=2)):
        for mine, x in zip(CPU.quantize_many(xs, scheme, method), xs, strict=True):
            alone = CPU.quantize(x, scheme, method)
            assert mine.errors == alone.errors
            if alone.errors.finite:
                assert_same(mine, alone)


@SHAPED
@given(schemes(), st.sampled_from(DTYPES), st.integers(1, 40), COLUMNS, st.integers(0, 2**32 - 1))
@example(IntegerScheme(bits=3, group_size=16), DTYPES[0], 1, 8209, 1)
def test_what_is_dequantized_is_what_the_reference_dequantizes(scheme, dtype, rows, cols, seed) -> None:
    q = REFERENCE.quantize(values("normal", seed, rows, cols, dtype), scheme, MinMax())
    mine, theirs = CPU.dequantize(q), REFERENCE.dequantize(q)
    assert mine.dtype == np.float32
    assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("cols", [2048, 2056, 2000, 2047])
@pytest.mark.parametrize("scheme", [IntegerScheme(group_size=32), IntegerScheme(bits=3), CodebookScheme()], ids=str)
def test_what_is_too_large_for_the_cache_is_dequantized_to_the_same_numbers(scheme: Scheme, cols: int, rng) -> None:
    q = CPU.quantize(rng.standard_normal((STREAMED_BYTES // 8000 + 3, cols)).astype(np.float32), scheme, MinMax())
    decoded = CPU.dequantize(q)
    assert decoded.nbytes >= STREAMED_BYTES
    assert np.array_equal(decoded, REFERENCE.dequantize(q))


@settings(SHAPED, max_examples=40)
@given(
    schemes().filter(lambda scheme: scheme.free == scheme), st.sampled_from(DTYPES),
    st.sampled_from(["normal", "sparse", "positive", "outlier", "zeros"]),
    st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_mse_finds_grids_as_good_as_the_reference(scheme, dtype, kind, rows, cols, seed) -> None:
    x = values(kind, seed, rows, cols, dtype)
    mine, theirs = CPU.quantize(x, scheme, Mse()).errors, REFERENCE.quantize(x, scheme, Mse()).errors
    # Two descents that part at a rounding can end apart: it shows where there are only a few groups.
    assert mine.sum_dd == pytest.approx(theirs.sum_dd, rel=3e-2, abs=1e-9 * theirs.sum_xx)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["normal", "positive", "outlier"])
def test_the_error_of_mse_over_a_tensor_is_that_of_the_reference(bits: int, symmetric: bool, kind: str, rng) -> None:
    # Where a weight lies next to the middle of two codes, fixed point may send it to the other, and the descent ends
    # elsewhere, above as often as below: of so many groups it does not show.
    x = values(kind, int(rng.integers(1 << 32)), 256 if bits in (3, 4) else 64, 992, np.dtype(np.float32))
    scheme = IntegerScheme(bits=bits, is_symmetric=symmetric, group_size=32)
    results = [one.quantize(x, scheme, Mse()) for one in (CPU, REFERENCE)]
    lost = [((x - REFERENCE.dequantize(q)).reshape(-1, 32).astype(np.float64) ** 2).sum(1) for q in results]
    assert np.log(lost[0] / lost[1]).mean() == pytest.approx(0, abs=1e-3)
    if kind != "outlier":  # a few groups of several outliers are nearly all of that sum
        assert results[0].errors.sum_dd == pytest.approx(results[1].errors.sum_dd, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("kind", ["normal", "positive"])
def test_the_error_of_nested_grids_over_a_tensor_is_that_of_the_reference(bits: int, kind: str, rng) -> None:
    x = values(kind, int(rng.integers(1 << 32)), 48, 1000, np.dtype(np.float32))
    for group_size in (16, 32):
        scheme = NestedScheme(bits=bits, group_size=group_size)
        mine, theirs = CPU.quantize(x, scheme, Mse()).errors, REFERENCE.quantize(x, scheme, Mse()).errors
        # Descents of a whole super-block that part at a rounding end apart, above as often as below.
        assert mine.sum_dd == pytest.approx(theirs.sum_dd, rel=6e-3)


@pytest.mark.parametrize(
    "scheme", [IntegerScheme(bits=2), CodebookScheme(), IntegerScheme(bits=8, granularity="channel")], ids=str
)
@pytest.mark.parametrize(
    "method",
    [
        Mse(clips=(), max_iterations=3),
        Mse(clips=(0.9,)),
        Mse(clips=(0.5, 1.0), max_iterations=1),
        Mse(clips=(1.0, 0.7), max_iterations=0),
        Mse(clips=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5), max_iterations=2),
    ],
    ids=str,
)
def test_mse_takes_every_start_and_step_that_its_parameters_allow_and_no_other(
    scheme: Scheme, method: Mse, rng
) -> None:
    x = rng.standard_normal((40, 650)).astype(np.float32)
    mine, theirs = CPU.quantize(x, scheme, method), REFERENCE.quantize(x, scheme, method)
    assert mine.errors.sum_dd == pytest.approx(theirs.errors.sum_dd, rel=3e-4)
    assert np.mean(mine.scale == theirs.scale) > 0.9


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_sums_of_a_group_of_any_length_stay_exact_in_fixed_point(bits: int, symmetric: bool, rng) -> None:
    # Elements as large as they can be, so that sums are as well: what overflows shows in the grid.
    x = np.where(rng.random((5, 66_000)) < 0.999, 1.0, -0.25).astype(np.float32)
    scheme = IntegerScheme(bits=bits, is_symmetric=symmetric, granularity="channel")
    for part in (x, x[:, :65_536], x[:, :4_097], x[:, :255], x[:, :17]):
        mine, theirs = CPU.quantize(part, scheme, Mse()), REFERENCE.quantize(part, scheme, Mse())
        assert mine.errors.sum_dd == pytest.approx(theirs.errors.sum_dd, rel=1e-3, abs=1e-9 * theirs.errors.sum_xx)


@settings(SHAPED, max_examples=40)
@given(st.sampled_from(DTYPES), st.sampled_from(DTYPES), KINDS, st.integers(1, 40), COLUMNS, st.integers(0, 2**32 - 1))
def test_compare_gives_the_sums_of_the_reference(x_dtype, y_dtype, kind, rows, cols, seed) -> None:
    x, y = values(kind, seed, rows, cols, x_dtype), values("normal", seed + 1, rows, cols, y_dtype)
    assert_close(CPU.compare(x, y), REFERENCE.compare(x, y))


@settings(SHAPED, max_examples=25)
@given(st.sampled_from(DTYPES), KINDS, st.integers(1, 9), COLUMNS, st.integers(0, 2**32 - 1))
def test_observe_counts_as_the_reference_counts(dtype, kind, rows, cols, seed) -> None:
    x = values(kind, seed, rows, cols, dtype)
    mine, theirs = CPU.observe(x), REFERENCE.observe(x)
    assert np.array_equal(mine.counts, theirs.counts)
    assert (mine.lo, mine.hi, mine.finite) == (theirs.lo, theirs.hi, theirs.finite)
    np.testing.assert_allclose(mine.sums, theirs.sums, rtol=1e-9)


def test_observe_notices_what_is_not_finite_and_does_not_depend_on_the_threads(rng) -> None:
    x = rng.standard_normal((1100, 4096)).astype(np.float16)
    one, three = CpuBackend(1).observe(x), CpuBackend(3).observe(x)
    assert np.array_equal(one.sums, three.sums)
    for bad in (np.nan, np.inf):
        x[1099, 7] = bad
        assert not CPU.observe(x).finite


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [IntegerScheme(granularity="tensor", bits=5), CodebookScheme(granularity="tensor")])
def test_one_grid_for_a_tensor_gives_the_bytes_of_the_reference(scheme: Scheme, dtype: np.dtype, rng) -> None:
    x = rng.standard_normal((70, 777)).astype(dtype)
    grid = CPU.tensor_grid(CPU.observe(x), scheme, MinMax())
    assert_same(CPU.quantize(x, scheme, MinMax(), grid), REFERENCE.quantize(x, scheme, MinMax(), grid))
    assert_same(CPU.quantize(x, scheme, Mse(), grid), REFERENCE.quantize(x, scheme, Mse(), grid))


def test_values_beside_the_midpoints_of_nf4_go_where_the_reference_sends_them() -> None:
    near = np.concatenate([np.nextafter(NF4_MIDPOINTS, d, dtype=np.float32) for d in (-2, 2)])
    x = np.concatenate([[1.0], near, NF4_MIDPOINTS, np.linspace(-1, 1, 10001)]).astype(np.float32)[None]
    grid = Grid(np.float32(1.0), np.float32(0.0))
    scheme = CodebookScheme(granularity="tensor")
    assert_same(CPU.quantize(x, scheme, MinMax(), grid), REFERENCE.quantize(x, scheme, MinMax(), grid))


@pytest.mark.parametrize(
    "scheme", [cls(granularity="tensor") for cls in (Fp4, Float8E4M3, Float8E5M2)], ids=lambda s: s.id
)
def test_values_at_and_beside_the_midpoints_of_small_floats_go_where_the_reference_sends_them(
    scheme: MiniFloatScheme, rng
) -> None:
    levels = np.unique(scheme.element.table[np.isfinite(scheme.element.table)])
    ties = (levels[1:] + levels[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(way), dtype=np.float32) for way in (-np.inf, np.inf)]
    anything = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    x = np.concatenate([levels, ties, *beside, anything[np.abs(anything) < 1e15], [-0.0]]).astype(np.float32)
    for part in (x[: len(x) // 32 * 32].reshape(-1, 32), x[: len(x) // 7 * 7].reshape(-1, 7)):
        for scale in (1.0, 0.0371):
            grid = Grid(np.float32(scale), np.float32(0.0))
            assert_same(CPU.quantize(part, scheme, MinMax(), grid), REFERENCE.quantize(part, scheme, MinMax(), grid))


@pytest.mark.parametrize("scheme", FLOATS, ids=repr)
def test_the_error_of_small_floats_over_a_tensor_is_that_of_the_reference(scheme: MiniFloatScheme, rng) -> None:
    x = values("normal", int(rng.integers(1 << 32)), 150, 500, np.dtype(np.float32))
    counts = LayerInputs(500, mean_square=rng.lognormal(0, 1, 500).astype(np.float32))
    for inputs in (None, counts):
        weights = np.ones(500, np.float32) if inputs is None else inputs.weights
        made = [one.quantize(x, scheme, Mse(), inputs=inputs) for one in (CPU, REFERENCE)]
        mine, theirs = (float((weights * (x - REFERENCE.dequantize(q)) ** 2).sum()) for q in made)
        assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("method", [MinMax(), Mse()], ids=lambda m: m.id)
@pytest.mark.parametrize("scheme", [IntegerScheme(bits=3), CodebookScheme(granularity="channel"), *FLOATS], ids=repr)
def test_the_number_of_threads_changes_no_bit_of_the_result(scheme: Scheme, method: Method, rng) -> None:
    x = rng.standard_normal((INLINE_ELEMENTS // 500 + 37, 1001)).astype(np.float32)
    results = [CpuBackend(threads).quantize(x, scheme, method) for threads in (1, 2, 5)]
    for other in results[1:]:
        assert np.array_equal(other.packed, results[0].packed)
        assert np.array_equal(other.scale, results[0].scale)
        assert other.errors == results[0].errors
    decoded = CPU.dequantize(results[0])
    assert CpuBackend(1).compare(x, decoded) == CpuBackend(3).compare(x, decoded)


def test_calls_from_several_threads_do_not_disturb_each_other(rng) -> None:
    inputs = [rng.standard_normal((300, 800 + i)).astype(np.float32) for i in range(8)]
    alone = [CPU.quantize(x, IntegerScheme(), MinMax()) for x in inputs]
    with ThreadPoolExecutor(8) as callers:
        together = list(callers.map(lambda x: CPU.quantize(x, IntegerScheme(), MinMax()), inputs * 3))
    for mine, theirs in zip(together, alone * 3, strict=True):
        assert np.array_equal(mine.packed, theirs.packed)
        assert mine.errors == theirs.errors


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", [MinMax(), Mse()], ids=lambda m: m.id)
def test_a_value_that_is_not_finite_is_noticed_wherever_it_is(bad: float, dtype: np.dtype, method: Method, rng) -> None:
    for at in (0, 4999, 5000, 20005):
        x = rng.standard_normal((3, 6669)).astype(dtype)
        x.reshape(-1)[at] = bad
        channel = IntegerScheme(is_symmetric=True, granularity="channel")
        for scheme in (IntegerScheme(), channel, CodebookScheme(), Float8E4M3(granularity="block"), Mx()):
            assert not CPU.quantize(x, scheme, method).errors.finite
        assert not CPU.compare(x, np.zeros_like(x)).finite


def test_mapped_and_unaligned_and_read_only_input_is_read_as_it_is(rng) -> None:
    x = rng.standard_normal((33, 300)).astype(np.float32)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.float32, offset=1).reshape(x.shape)
    assert not unaligned.flags.aligned
    assert not unaligned.flags.writeable
    expected = REFERENCE.quantize(x, IntegerScheme(), MinMax())
    assert_same(CPU.quantize(unaligned, IntegerScheme(), MinMax()), expected)
    assert_same(CPU.quantize(np.asfortranarray(x), IntegerScheme(), MinMax()), expected)


class Median(MinMax):
    """A method of which the kernels know nothing."""

    id: ClassVar[str] = "median"

    def find(self, xp, x, scheme, weights=None):
        """The grid of half the range."""
        scale, zero = super().find(xp, x, scheme, weights)
        return scheme.store_scale(xp, scale / xp.float32(2)), zero


class Coarse(IntegerScheme):
    """A scheme of which the kernels know nothing."""

    def grid(self, xp, lo, hi):
        """Twice the range."""
        return super().grid(xp, lo * xp.float32(2), hi * xp.float32(2))


def test_a_method_or_scheme_without_a_kernel_runs_as_the_reference_runs_it(rng) -> None:
    x = rng.standard_normal((40, 200)).astype(np.float32)
    for scheme, method in ((IntegerScheme(), Median()), (Coarse(), MinMax()), (Coarse(), Mse())):
        assert_same(CPU.quantize(x, scheme, method), REFERENCE.quantize(x, scheme, method))


def test_no_rows_are_no_work() -> None:
    x = np.zeros((0, 128), np.float32)
    assert CPU.compare(x, x) == ErrorSums()
