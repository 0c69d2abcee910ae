"""What holds for every method, looked up as a user does."""

from __future__ import annotations

import inspect
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from service.engine.calibration.opening import open_calibration
from service.engine.formats.registry import open_model
from service.engine.methods.base import Method
from service.engine.methods.registry import methods
from service.engine.plan import make_plan
from service.engine.schemes.base import Scheme
from tests.contract.cases import check_parameters, full_label, group_schemes, hard_groups
from tests.engine.calibrations import save_safetensors
from tests.engine.helpers import normal, save, specs

METHODS = pytest.mark.parametrize("method", [cls() for cls in methods().values()], ids=lambda m: m.id)
#: Those that find grids by themselves; others leave it to one of these.
FINDERS = pytest.mark.parametrize(
    "method", [m for cls in methods().values() if (m := cls()).quantizes_as == m], ids=lambda m: m.id
)
GROUP_SCHEMES = pytest.mark.parametrize("scheme", list(group_schemes()), ids=full_label)


def error(x: np.ndarray, scheme: Scheme, method: Method) -> np.ndarray:
    """Squared error of each group of x (..., g), in float64."""
    scale, zero = method.find(np, x, scheme)
    decoded = scheme.decode(np, scheme.encode(np, x, scale, zero), scale, zero)
    return ((x.astype(np.float64) - decoded) ** 2).sum(-1)


@METHODS
def test_a_method_is_chosen_by_its_name(method: Method, tmp_path: Path) -> None:
    assert inspect.getmodule(type(method)).__name__.endswith(f".{method.id}")  # type: ignore[union-attr]
    model = save(tmp_path / "m.safetensors", {"layer.weight": normal(64, 128)})
    fed = save_safetensors(tmp_path / "c.safetensors", {"layer.gram": np.eye(128, dtype=np.float32)})
    with closing(open_model(model)) as reader, closing(open_calibration(fed)) as calibration:
        plan = make_plan(reader, specs("parquet", method=method.id), calibration)
        assert plan.tensors[0].decisions[0].method == method


@METHODS
def test_a_method_is_a_value(method: Method) -> None:
    check_parameters(method)
    with pytest.raises(ValidationError, match="sparse"):
        type(method)(sparse=True)


@FINDERS
@GROUP_SCHEMES
def test_what_is_found_can_be_stored(method: Method, scheme: Scheme, rng: np.random.Generator) -> None:
    x = hard_groups(rng).reshape(25, 10, 64)
    scale, zero = method.find(np, x, scheme)
    assert scale.shape == zero.shape == (25, 10)
    assert scale.dtype == zero.dtype == np.float32
    assert (scale > 0).all() or scheme.free != scheme
    stored = scheme.float_grid(*scheme.stored_grid(scale, zero, 10 * 32), 10 * 32)
    for found, back in zip((scale, zero), stored, strict=True):
        assert np.array_equal(found, back)


@FINDERS
@GROUP_SCHEMES
def test_no_method_is_worse_than_minmax(method: Method, scheme: Scheme, rng: np.random.Generator) -> None:
    x = hard_groups(rng)[:, None]
    minmax = error(x, scheme, methods()["minmax"]())
    assert (error(x, scheme, method) <= minmax * 1.00001 + 1e-12).all()


@FINDERS
@GROUP_SCHEMES
def test_a_group_is_quantized_alike_in_any_company(method: Method, scheme: Scheme, rng: np.random.Generator) -> None:
    x = hard_groups(rng)[:, None]
    scale, zero = method.find(np, x, scheme)
    for part in (slice(0, 1), slice(49, 51), slice(100, 250)):
        for together, alone in zip((scale[part], zero[part]), method.find(np, x[part], scheme), strict=True):
            assert np.array_equal(together, alone)


@FINDERS
@GROUP_SCHEMES
def test_an_element_of_no_weight_does_not_count(method: Method, scheme: Scheme, rng: np.random.Generator) -> None:
    x = hard_groups(rng)
    weights = (np.arange(64) % 4 > 0).astype(np.float32)
    other = np.where(weights > 0, x, np.float32(1000.0))
    for one, two in zip(method.find(np, x, scheme, weights), method.find(np, other, scheme, weights), strict=True):
        assert np.array_equal(one, two)
