"""What becomes of a tensor that cannot be stored as it was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from service.errors import NonFiniteWeights
from tests.engine.helpers import normal, run, save, save_folder, specs


def test_a_fallback_passes_over_a_width_that_the_format_cannot_hold(tmp_path: Path) -> None:
    # Eight rows with zero points in groups: the one case in which four bits are refused.
    model = save_folder(tmp_path / "model", {"few.weight": normal(8, 1024), "many.weight": normal(32, 1024)})
    asked = specs("compressed-tensors", bit_width=3, group_size=32, symmetric=False, min_accuracy=0.99)
    report = run(model, tmp_path / "work", asked)
    assert {t.name: t.scheme for t in report.outputs[0].tensors} == {"few.weight": "int6", "many.weight": "int4"}


@pytest.mark.parametrize(("dtype", "value"), [(np.float64, 1e300), (np.float64, np.nan), (np.float32, np.inf)])
def test_a_number_too_large_for_float32_is_not_called_an_infinity(
    tmp_path: Path, dtype: type[np.generic], value: float
) -> None:
    weight = normal(64, 128, dtype=dtype)
    weight[3, 5] = value
    source = save(tmp_path / "m.safetensors", {"a.weight": weight})
    with pytest.raises(NonFiniteWeights) as caught:
        run(source, tmp_path / "fails", specs("parquet"))
    report = run(source, tmp_path / "copies", specs("parquet", on_non_finite="copy"))
    for text in (caught.value.detail, *report.warnings, report.outputs[0].tensors[0].rule):
        assert ("too large for float32" in text) == (dtype is np.float64)
        assert "NaN" in text
