"""What holds for every scheme, looked up as a user does."""

from __future__ import annotations

import numpy as np
import pytest

from service.engine.methods.registry import methods
from service.engine.schemes.base import SCALE_DTYPES, Scheme
from service.engine.schemes.registry import build_scheme, schemes
from tests.contract.cases import (
    all_schemes,
    backend,
    check_parameters,
    full_label,
    group_schemes,
    hard_groups,
    plain_schemes,
)
from tests.engine.formats.outputs import label
from tests.golden.cases import parts

GROUP_SCHEMES = pytest.mark.parametrize("scheme", list(group_schemes()), ids=full_label)
PLAIN_SCHEMES = pytest.mark.parametrize("scheme", list(plain_schemes()), ids=full_label)
MINMAX = methods()["minmax"]()


def levels(scheme: Scheme, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """(n, 2**bits) float32: all finite numbers that the codes of each group can stand for."""
    codes = np.broadcast_to(np.arange(1 << scheme.bits, dtype=np.uint8), (len(scale), 1 << scheme.bits))
    found = scheme.decode(np, codes, scale, zero)
    return found[:, np.isfinite(found[0])]


@pytest.mark.parametrize("id_", schemes())
def test_a_scheme_is_what_its_name_says(id_: str) -> None:
    found = [scheme for scheme in all_schemes() if scheme.id == id_]
    assert found, "it can be built per tensor, per channel or per group"
    for scheme in found:
        assert scheme.bits == schemes()[id_].ids[id_]
        check_parameters(scheme)
    with pytest.raises(ValueError, match="sparse"):
        build_scheme(id_, symmetric=found[0].symmetric, sparse=True)


@GROUP_SCHEMES
def test_a_value_becomes_the_nearest_of_the_levels_that_there_are(scheme: Scheme, rng: np.random.Generator) -> None:
    x = hard_groups(rng)
    scale, zero = MINMAX.find(np, x, scheme)
    codes = scheme.encode(np, x, scale, zero)
    assert codes.dtype == np.uint8
    assert int(codes.max()) < 1 << scheme.bits
    decoded = scheme.decode(np, codes, scale, zero)
    assert decoded.dtype == np.float32
    nearest = np.abs(x[..., None] - levels(scheme, scale, zero)[:, None, :]).min(-1)
    # A value in the middle of two levels may go to either, as rounding has it.
    assert (np.abs(x - decoded) <= nearest + 1e-5 * (np.abs(x) + scale[:, None])).all()


@GROUP_SCHEMES
def test_levels_stay_where_they_are(scheme: Scheme, rng: np.random.Generator) -> None:
    scale, zero = MINMAX.find(np, hard_groups(rng), scheme)
    held = levels(scheme, scale, zero)
    assert np.array_equal(scheme.decode(np, scheme.encode(np, held, scale, zero), scale, zero), held)


@PLAIN_SCHEMES
def test_the_levels_reach_over_the_range_of_the_weights(scheme: Scheme, rng: np.random.Generator) -> None:
    x = hard_groups(rng)
    held = levels(scheme, *MINMAX.find(np, x, scheme))
    lo, hi = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    # Half a step for the rounding of a zero point; at 8 bits that of a BF16 scale adds up to a whole one.
    slack = 1.6 * np.diff(np.sort(held, axis=-1), axis=-1).max(-1)
    assert (held.min(-1) <= lo + slack).all()
    assert (held.max(-1) >= hi - slack).all()


@PLAIN_SCHEMES
def test_zero_is_kept_exactly(scheme: Scheme, rng: np.random.Generator) -> None:
    x = hard_groups(rng)
    x[:, 7] = 0.0
    x[3] = -0.0
    scale, zero = MINMAX.find(np, x, scheme)
    decoded = scheme.decode(np, scheme.encode(np, x, scale, zero), scale, zero)
    assert not decoded[:, 7].any()
    assert not decoded[3].any()
    assert scale[3] == 1.0, "a group of zeros"


@PLAIN_SCHEMES
def test_a_grid_is_what_can_be_stored(scheme: Scheme, rng: np.random.Generator) -> None:
    x = hard_groups(rng)
    for scale, zero in (MINMAX.find(np, x, scheme), MINMAX.find(np, x * np.float32(1e-9), scheme)):
        assert scale.dtype == np.float32
        assert np.array_equal(scale, scale.astype(SCALE_DTYPES[scheme.scale_dtype]).astype(np.float32))
        assert np.isfinite(np.float32(1.0) / scale).all()
        assert np.array_equal(zero, np.clip(np.rint(zero), 0, (1 << scheme.bits) - 1))
        if scheme.symmetric:
            assert (zero == scheme.implied_zero).all()


@pytest.mark.parametrize("id_", sorted({scheme.id for scheme in plain_schemes()}))
def test_a_refitted_grid_is_no_worse_while_the_codes_are_held(id_: str, rng: np.random.Generator) -> None:
    for scheme in plain_schemes():
        if scheme.id != id_ or scheme.scale_dtype != "F32":
            continue
        x = rng.standard_normal((200, 64)).astype(np.float32)
        scale, zero = MINMAX.find(np, x, scheme)
        codes = scheme.encode(np, x, scale, zero)
        before = ((x - scheme.decode(np, codes, scale, zero)) ** 2).sum()
        after = ((x - scheme.decode(np, codes, *scheme.refit(np, x, codes, scale, zero, None))) ** 2).sum()
        assert after <= before * 1.000001


@pytest.mark.parametrize("scheme", list(all_schemes()), ids=label)
def test_the_bytes_that_are_announced_are_those_that_are_made(scheme: Scheme, rng: np.random.Generator) -> None:
    reference = backend("reference")
    x = rng.standard_normal((6, 72)).astype(np.float32)
    grid = reference.tensor_grid(reference.observe(x), scheme, MINMAX) if scheme.takes_pass else None
    made = parts(reference.quantize(x, scheme, MINMAX, grid))
    zeros = made.pop("zero_point", np.empty(0)).size
    if scheme.free == scheme:  # a byte in memory, so many bits in a file
        zeros = -(-zeros * scheme.bits // 8)
    assert sum(part.nbytes for part in made.values()) + zeros == scheme.stored_bytes(6, 72)
