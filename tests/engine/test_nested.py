"""Scales under super-scales: what they cost, what they lose, and what is found when they are searched for."""

from __future__ import annotations

import numpy as np
import pytest

from service.engine.backends.reference import ReferenceBackend
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.schemes.nested import GRID_BITS, SUPER_SIZE, NestedScheme
from service.engine.schemes.registry import build_scheme

BACKEND = ReferenceBackend()
NESTED = pytest.mark.parametrize("bits", GRID_BITS)
#: Bits per weight of ggml's K types, which are to be beaten at no more.
K_TYPES = {2: 2.625, 3: 3.4375, 4: 4.5, 5: 5.5, 6: 6.5625}


def nested(bits: int, group_size: int = 16) -> NestedScheme:
    """The scheme of this width."""
    scheme = build_scheme(f"int{bits}_nested", symmetric=False, group_size=group_size)
    assert isinstance(scheme, NestedScheme)
    return scheme


def weights(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Heavy-tailed, as those of a trained layer."""
    return (rng.standard_t(5, (rows, cols)) * 0.04).astype(np.float32)


@NESTED
def test_it_takes_no_more_bits_than_the_k_type_of_its_width(bits: int) -> None:
    scheme = nested(bits)
    for cols in (384, 512, 1536, 4096):
        assert scheme.stored_bytes(64, cols) * 8 / (64 * cols) <= K_TYPES[bits]


@NESTED
@pytest.mark.parametrize("cols", [16, 40, 384, 1096])
def test_what_is_stored_is_what_was_found(bits: int, cols: int, rng: np.random.Generator) -> None:
    scheme = nested(bits)
    for method in (MinMax(), Mse()):
        q = BACKEND.quantize(weights(rng, 4, cols), scheme, method)
        scale, zero = scheme.float_grid(q.scale, q.zero_point, cols)
        assert scale.shape == zero.shape == (4, scheme.groups(cols))
        back = scheme.stored_grid(scale, zero, cols)
        assert np.array_equal(back[0], q.scale)
        assert back[1] is not None
        assert np.array_equal(back[1], q.zero_point)
        assert q.nbytes == scheme.stored_bytes(4, cols)


@NESTED
def test_the_search_loses_much_less_than_rounding_to_nearest(bits: int, rng: np.random.Generator) -> None:
    x = weights(rng, 16, 1024)
    naive, searched = (BACKEND.quantize(x, nested(bits), method).errors.sum_dd for method in (MinMax(), Mse()))
    assert searched < 0.85 * naive


@NESTED
def test_codes_for_scales_lose_less_than_twice_what_free_scales_lose(bits: int, rng: np.random.Generator) -> None:
    x = weights(rng, 8, 1024)
    scheme, groups = nested(bits), x.reshape(8, -1, 16)
    free = scheme.free
    scale, zero = Mse().find(np, groups, free)
    least = ((groups - free.decode(np, free.encode(np, groups, scale, zero), scale, zero)) ** 2).sum()
    assert BACKEND.quantize(x, scheme, Mse()).errors.sum_dd < 2 * least


def test_no_super_block_loses_more_than_by_its_ranges(rng: np.random.Generator) -> None:
    x = weights(rng, 6, 1024).reshape(6, 64, 16)
    x[1] *= np.exp2(rng.integers(-12, 12, (64, 1))).astype(np.float32)
    x[2] += 5
    x[3, ::3] = 0
    x[4, 7, 5] = 1000.0
    scheme = nested(3)
    naive, searched = (
        ((x - scheme.decode(np, scheme.encode(np, x, *grid), *grid)) ** 2).reshape(6, 2, -1).sum(-1)
        for grid in (MinMax().find(np, x, scheme), Mse().find(np, x, scheme))
    )
    assert (searched <= naive * 1.00001).all()


def test_columns_that_count_more_lose_less(rng: np.random.Generator) -> None:
    x = weights(rng, 32, 512).reshape(32, 32, 16)
    counts = np.where(np.arange(512) % 4 == 0, 20.0, 1.0).astype(np.float32).reshape(32, 16)
    scheme = nested(3)

    def lost(counted: np.ndarray | None) -> float:
        grid = Mse().find(np, x, scheme, counted)
        return float((counts * (x - scheme.decode(np, scheme.encode(np, x, *grid), *grid)) ** 2).sum())

    assert lost(counts) < 0.9 * lost(None)


def test_groups_of_zeros_stay_zeros(rng: np.random.Generator) -> None:
    x = weights(rng, 4, SUPER_SIZE * 2)
    x[0] = 0
    x[1, :SUPER_SIZE] = 0
    x[2, 32:64] = 0
    for method in (MinMax(), Mse()):
        back = BACKEND.dequantize(BACKEND.quantize(x, nested(4), method))
        assert not back[0].any()
        assert not back[1, :SUPER_SIZE].any()
        assert not back[2, 32:64].any()


def test_a_row_of_zeros_needs_no_wider_scales() -> None:
    scheme = nested(4)
    q = BACKEND.quantize(np.zeros((2, 96), np.float32), scheme, MinMax())
    assert scheme.largest_scale(q.scale, 96) == 1.0


@pytest.mark.parametrize("fields", [{"group_size": 64}, {"granularity": "channel"}, {"symmetric": True}])
def test_what_it_cannot_be_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"group_size|granularity|symmetric"):
        build_scheme("int4_nested", **{"symmetric": False, **fields})  # type: ignore[arg-type]
