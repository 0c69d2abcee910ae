"""What the contract tests run over: all that is registered, in every form that it can have."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product
from typing import Any, get_args

import ml_dtypes
import numpy as np
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from service.engine.backends.base import Backend
from service.engine.backends.registry import backends
from service.engine.schemes.base import ScaleDtype, Scheme
from service.engine.schemes.registry import build_scheme, schemes
from tests.engine.formats.outputs import label

#: Each with the sizes of groups, of which the first that a scheme can have is taken.
GRANULARITIES = (("tensor", (None,)), ("channel", (None,)), ("block", (None,)), ("group", (32, 16)))
#: Dtypes that weights are stored in.
DTYPES = [np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)]


def all_schemes() -> Iterator[Scheme]:
    """Every scheme id with every symmetry and granularity that it has."""
    for id_, symmetric, (granularity, sizes) in product(schemes(), (True, False), GRANULARITIES):
        yield from _first(id_, sizes, symmetric=symmetric, granularity=granularity)


def group_schemes() -> Iterator[Scheme]:
    """Every scheme id with every symmetry and dtype of scales that it has, per group, or per row if it has none."""
    for id_, symmetric, dtype in product(schemes(), (True, False), get_args(ScaleDtype)):
        granularity = "group" if "group" in schemes()[id_].choices("granularity") else "channel"
        sizes = dict(GRANULARITIES)[granularity]
        yield from _first(id_, sizes, symmetric=symmetric, granularity=granularity, scale_dtype=dtype)


def _first(id_: str, sizes: Sequence[int | None], **parameters: Any) -> Iterator[Scheme]:
    """The scheme with the first of these group sizes that it can have."""
    for size in sizes:
        with suppress(ValueError):
            yield build_scheme(id_, group_size=size, **parameters)
            return


def plain_schemes() -> Iterator[Scheme]:
    """Those of them in which groups of a row share nothing."""
    return (scheme for scheme in group_schemes() if scheme.free == scheme)


def full_label(scheme: Scheme) -> str:
    """For the reader of a test's output: the dtype of the scales as well."""
    return f"{label(scheme)}-{scheme.scale_dtype}"


def usable_backends() -> list[str]:
    """The ids of all backends that can run here."""
    return [id_ for id_, cls in backends().items() if cls.unavailable() is None]


def backend(id_: str, threads: int = 1) -> Backend:
    """A new instance of a backend."""
    return backends()[id_](threads=threads)


def hard_groups(rng: np.random.Generator) -> np.ndarray:
    """(250, 64) float32: normal, heavy-tailed, positive, tiny and offset groups, fifty of each."""
    x = rng.standard_normal((250, 64))
    x[50:100] = rng.standard_t(2, (50, 64))
    x[100:150] = np.abs(x[100:150]) + 1
    x[150:200] *= 1e-3
    x[200:] += 5 * rng.standard_normal((50, 1))
    return x.astype(np.float32)


def check_parameters(model: BaseModel) -> None:
    """A scheme or a method is a value: described to clients, equal to what its JSON says, and of use as a key."""
    cls = type(model)
    schema = cls.model_json_schema()
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(model.model_dump(mode="json"))
    assert schema["additionalProperties"] is False
    assert (inspect.getdoc(cls) or "").splitlines()[0], "the first line stands in the catalog"
    assert cls.model_validate_json(model.model_dump_json()) == model
    assert hash(model) == hash(model.model_copy())
