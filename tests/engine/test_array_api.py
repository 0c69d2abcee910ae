"""The arithmetic of schemes and methods is in the array API standard, so that any library that has it can run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import array_api_strict
import cupy
import numpy as np
import pytest

from service.engine import methods as methods_package
from service.engine import schemes as schemes_package
from service.engine.methods.registry import methods
from service.engine.schemes.base import Scheme
from tests.contract.cases import all_schemes, hard_groups
from tests.engine.formats.outputs import label

#: Scales of two bytes are of dtypes that the standard does not have.
SCHEMES = [scheme.model_copy(update={"scale_dtype": "F32"}) for scheme in all_schemes()]


def computed(xp: Any, groups: np.ndarray, weights: np.ndarray | None, scheme: Scheme, method: str) -> list[np.ndarray]:
    """Scale, zero point, codes, and what those stand for."""
    x, counts = xp.asarray(groups), None if weights is None else xp.asarray(weights)
    scale, zero = methods()[method]().find(xp, x, scheme, counts)
    codes = scheme.encode(xp, x, scale, zero)
    return [np.asarray(found) for found in (scale, zero, codes, scheme.decode(xp, codes, scale, zero))]


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
def test_the_strictest_library_computes_what_numpy_computes(scheme: Scheme, method: str, rng) -> None:
    groups = hard_groups(rng)[::5]
    for weights in (None, rng.integers(0, 3, groups.shape).astype(np.float32)):
        with np.errstate(all="ignore"):
            expected = computed(np, groups, weights, scheme, method)
            found = computed(array_api_strict, groups, weights, scheme, method)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == theirs.dtype
            assert mine.tobytes() == theirs.tobytes()


def test_cupy_has_every_function_that_they_use() -> None:
    folders = [Path(str(package.__file__)).parent for package in (schemes_package, methods_package)]
    used = {
        name
        for folder in folders
        for file in folder.glob("*.py")
        for name in re.findall(r"\bxp\.(\w+)", file.read_text())
    }
    assert {"searchsorted", "round", "astype"} <= used
    assert [name for name in sorted(used) if not hasattr(cupy, name)] == []
