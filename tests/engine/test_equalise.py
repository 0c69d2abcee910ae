"""Inputs divided and weights multiplied, column by column: what it gains, and that nothing else changes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from service.engine.backends.cpu import CpuBackend
from service.engine.equalise import LARGEST, Stretch, best_scale, divided, scales
from service.engine.formats.registry import open_model
from service.engine.inputs import LayerInputs
from service.engine.methods.minmax import MinMax
from service.engine.plan import check_outputs
from service.engine.schemes.registry import build_scheme
from service.errors import UnsupportedByFormat
from tests.engine.calibrations import gram, samples, save_safetensors
from tests.engine.helpers import normal, run, save, specs

BACKEND = CpuBackend()
INT3 = build_scheme("int3", symmetric=False, group_size=64)


def salient(count: int, cols: int, seed: int) -> np.ndarray:
    """Inputs (count, cols) of which some columns are thirty times as large as the others."""
    fed = np.random.default_rng(seed).standard_normal((count, cols), np.float32)
    fed[:, :: cols // 8] *= 30.0
    return fed


def test_of_salient_columns_awq_loses_less_of_the_output(tmp_path: Path) -> None:
    fed = salient(400, 256, seed=3)
    source = save(tmp_path / "m.safetensors", {"a.weight": normal(96, 256, seed=4)})
    calibration = save_safetensors(tmp_path / "c.safetensors", {"a.gram": gram(fed)})
    lost = {}
    for method in ("mse", "awq"):
        outputs = specs("parquet", method=method, bit_width=3, group_size=64)
        [output] = run(source, tmp_path / method, outputs, calibration=calibration, backend=BACKEND).outputs
        lost[method] = output.sums.output_relative_error
        assert output.tensors[0].stored_bytes == pytest.approx(96 * 256 * 3 / 8 + 96 * 4 * 3 + 1024 * (method == "awq"))
    assert lost["awq"] < 0.85 * lost["mse"]


def test_the_inverse_is_stored_so_that_weights_read_back_as_they_were(tmp_path: Path) -> None:
    w, fed = normal(96, 256, seed=4), salient(400, 256, seed=3)
    source = save(tmp_path / "m.safetensors", {"a.weight": w})
    calibration = save_safetensors(tmp_path / "c.safetensors", {"a.mean_square": (fed**2).mean(0)[None]})
    outputs = specs("parquet", method="awq", bit_width=8, granularity="tensor")
    [output] = run(source, tmp_path / "o", outputs, calibration=calibration, backend=BACKEND).outputs
    with closing(open_model(tmp_path / "o" / "parquet")) as reader:
        read = reader.rows(reader.tensors[0], 0, 96)
    assert output.tensors[0].sums is not None
    assert BACKEND.compare(w, read).sum_dd == pytest.approx(output.tensors[0].sums.sum_dd, rel=1e-6)
    assert BACKEND.compare(w, read).cosine_similarity > 0.999


@pytest.mark.parametrize("knows", ["gram", "mean_square"])
def test_the_best_scale_is_no_worse_than_none_and_than_all_that_are_tried(knows: str) -> None:
    x, fed = normal(64, 256, seed=1), samples(300, 256, seed=2)
    known = {"gram": gram(fed)} if knows == "gram" else {"mean_square": (fed**2).mean(0)}
    inputs = LayerInputs(256, absmax=np.abs(fed).max(0), **known)

    def round_trip(rows: np.ndarray) -> np.ndarray:
        return BACKEND.dequantize(BACKEND.quantize(rows, INT3, MinMax()))

    def lost(scale: np.ndarray) -> float:
        error = (round_trip(x * scale) / scale - x).astype(np.float64)
        metric = inputs.gram if inputs.gram is not None else np.diag(inputs.mean_square)
        return float(np.trace(error @ metric @ error.T))

    found = best_scale(x, inputs, round_trip)
    assert found is not None
    least = min(lost(scale) for scale in [np.ones(256, np.float32), *scales(x, inputs)])
    assert lost(found) == pytest.approx(least, rel=1e-4)


def test_layers_that_are_fed_alike_in_all_columns_are_left_as_they_are() -> None:
    x = np.sign(normal(64, 128)) * 0.05
    assert Stretch.of(x, INT3, LayerInputs(128, mean_square=np.ones(128, np.float32)), BACKEND) is None


def test_columns_that_are_never_fed_or_have_no_weights_are_scaled_in_bounds() -> None:
    x, square = normal(64, 128, seed=1), (samples(200, 128) ** 2).mean(0)
    x[:, 5], square[7], square[9] = 0.0, 0.0, 1e30
    for scale in scales(x, LayerInputs(128, mean_square=square.astype(np.float32))):
        assert ((scale >= 1 / LARGEST) & (scale <= LARGEST)).all()


def test_what_is_known_of_divided_inputs_is_what_would_be_measured_of_them() -> None:
    fed, scale = samples(300, 64), np.random.default_rng(5).uniform(0.5, 2, 64).astype(np.float32)
    found = divided(LayerInputs(64, gram=gram(fed), absmax=np.abs(fed).max(0)), scale)
    assert found.gram is not None
    assert found.absmax is not None
    np.testing.assert_allclose(found.gram, gram(fed / scale), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.absmax, np.abs(fed / scale).max(0), rtol=1e-5)


def test_a_format_whose_loaders_divide_no_inputs_refuses_the_method() -> None:
    with pytest.raises(UnsupportedByFormat, match="choose `parquet`, or another method"):
        check_outputs(specs("compressed-tensors", method="awq"), is_calibrated=True)
