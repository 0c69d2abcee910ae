"""An id means the same bytes for ever, in every backend that can run here."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from service.engine.backends.base import Backend
from service.engine.backends.registry import backends
from tests.golden.cases import FOLDER, Case, cases, parts, quantized

CASES = list(cases())


@pytest.mark.parametrize("backend", [b for b in backends().values() if b.unavailable() is None], ids=lambda b: b.id)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_scheme_gives_its_golden_bytes(case: Case, backend: type[Backend]) -> None:
    path = FOLDER / f"{case.name}.safetensors"
    assert path.is_file(), f"there is no {path.name}: `make golden` writes it; look at it before you commit it"
    golden = load_file(path)
    made = parts(quantized(backend(), case, golden.pop("weights")))
    assert made.keys() == golden.keys()
    for part, expected in golden.items():
        assert np.array_equal(made[part], expected), part


def test_there_is_no_golden_file_without_a_scheme() -> None:
    assert {p.stem for p in FOLDER.glob("*.safetensors")} == {c.name for c in CASES}
