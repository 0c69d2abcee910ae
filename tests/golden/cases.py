"""What the golden files hold: for every scheme some weights, and the bytes that `minmax` makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from service.engine.backends.base import Backend
from service.engine.backends.reference import ReferenceBackend
from service.engine.methods.minmax import MinMax
from service.engine.schemes.base import Scheme
from service.engine.schemes.registry import build_scheme, schemes
from service.engine.tensors import QuantizedRows

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Case:
    """A scheme and the name of its file."""

    name: str
    scheme: Scheme


def cases() -> Iterator[Case]:
    """Every scheme id, symmetric and asymmetric where it can be so."""
    for id_ in schemes():
        for symmetric in (True, False):
            with suppress(ValueError):
                name = f"{id_}-{'symmetric' if symmetric else 'asymmetric'}"
                yield Case(name, build_scheme(id_, symmetric=symmetric))


def weights() -> np.ndarray:
    """(6, 200) float32: ordinary rows, one of zeros, one with an outlier, one of positive numbers only."""
    x = np.random.default_rng(20260101).standard_normal((6, 200)).astype(np.float32)
    x[1] = 0.0
    x[2, 17] = 40.0
    x[3] = np.abs(x[3]) + np.float32(1.0)
    x[4] *= np.float32(1e-6)
    return x


def parts(q: QuantizedRows) -> dict[str, np.ndarray]:
    """What of a result is stored; the scale as its bytes, whatever its dtype."""
    found = {"packed": q.packed, "scale": np.ascontiguousarray(q.scale).view(np.uint8)}
    if q.tensor_scale is not None:
        found["tensor_scale"] = np.array([q.tensor_scale])
    return found if q.zero_point is None else found | {"zero_point": q.zero_point}


def quantized(backend: Backend, case: Case, x: np.ndarray) -> QuantizedRows:
    """What a backend makes of the weights."""
    method = MinMax()
    grid = backend.tensor_grid(backend.observe(x), case.scheme, method) if case.scheme.takes_pass else None
    return backend.quantize(x, case.scheme, method, grid)


def record(case: Case, x: np.ndarray) -> bytes:
    """A golden file: the weights as well, so that it depends on no generator of random numbers."""
    q = quantized(ReferenceBackend(), case, x)
    return save({"weights": x, **parts(q)}, {"scheme": case.scheme.model_dump_json()})
