"""The two diffusion models of `examples/digits-dit`: they draw digits, as PyTorch does, and quantize as they should."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine.formats.registry import open_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits-dit"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules, as its scripts see them."""
    monkeypatch.syspath_prepend(str(EXAMPLE))


@pytest.fixture(params=["dit", "unet"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Each model in turn."""
    return EXAMPLE / str(request.param)


def test_the_service_sees_image_diffusion_models(folder: Path) -> None:
    with closing(open_model(folder)) as reader:
        assert (reader.layout.modality, reader.layout.is_diffusion) == ("image", True)
        assert reader.layout.stem == "diffusion_pytorch_model"
        assert reader.layout.modality_from == "config.json"


def test_numpy_predicts_what_pytorch_does(folder: Path, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch", reason="install the extra `peers`")
    from digits.networks import WEIGHTS, load
    from digits.torch_models import build
    from safetensors.torch import load_file

    network = build(json.loads((folder / "config.json").read_text()))
    network.load_state_dict(load_file(folder / WEIGHTS))
    images, steps, labels = rng.standard_normal((9, 8, 8), np.float32), rng.integers(1000, size=9), np.arange(9)
    with torch.no_grad():
        expected = network(*(torch.from_numpy(x) for x in (images, steps, labels))).numpy()
    np.testing.assert_allclose(load(folder)(images, steps, labels), expected, atol=2e-5)


def test_images_of_a_class_are_alike(folder: Path) -> None:
    from digits.networks import load
    from digits.sampler import labels_for, sample

    run = sample(load(folder), labels_for(80), steps=12, seed=3)
    by_class = run.images.reshape(8, 10, 64).swapaxes(0, 1)  # (class, image, pixels)
    others = (by_class.sum(axis=1, keepdims=True) - by_class) / 7
    means = by_class.mean(axis=1)
    right = 0
    for label in range(10):
        for image, own in zip(by_class[label], others[label], strict=True):
            centres = means.copy()
            centres[label] = own  # the image itself is no witness
            right += int(np.argmin(np.linalg.norm(centres - image, axis=1)) == label)
    assert right > 64, f"{right} of 80 images are nearest to the mean of their class"


def test_calibration_holds_what_layers_were_fed(folder: Path) -> None:
    from digits.calibration import InputStatistics
    from digits.networks import load
    from digits.sampler import labels_for, sample

    seen, fed = InputStatistics(3), {}

    def tap(name: str, rows: np.ndarray) -> np.ndarray:
        fed.setdefault(name, []).append(rows)
        return seen(name, rows)

    sample(load(folder, tap=tap), labels_for(4), 3, 1, seen.on_step)
    arrays = seen.arrays()
    weights = load(folder).layers.weights
    for name, steps in fed.items():
        x, weight = np.concatenate(steps).astype(np.float64), weights[f"{name}.weight"]
        weight = weight.reshape(len(weight), -1)
        power = np.square(x @ weight.T).sum(axis=1).mean()
        assert np.trace(weight @ arrays[f"{name}.gram"] @ weight.T) == pytest.approx(power, rel=1e-4)
        for step, rows in enumerate(steps):
            assert arrays[f"{name}.range"][step].tolist() == [rows.min(), rows.max()]
            np.testing.assert_array_equal(arrays[f"{name}.absmax"][step], np.abs(rows).max(axis=0))
            np.testing.assert_allclose(arrays[f"{name}.mean_square"][step], np.square(rows).mean(axis=0), rtol=1e-4)
            assert arrays[f"{name}.count"][step] == len(rows)


def test_fewer_bits_cost_more_of_the_predicted_noise(folder: Path) -> None:
    from digits.measuring import Original
    from digits.quantized import quantized

    original = Original(folder, images=10, steps=6)
    errors = {bits: original.distance(_weights(quantized, folder, bits)).noise for bits in (8, 4, 2)}
    print(errors)
    assert 0 < 5 * errors[8] < errors[4] < 0.1
    assert 3 * errors[4] < errors[2] < 0.5


@pytest.mark.parametrize("bits", [4, 2])
def test_calibration_leaves_less_error_in_the_predicted_noise(folder: Path, bits: int, tmp_path: Path) -> None:
    from digits.calibration import write_calibration
    from digits.measuring import Original
    from digits.quantized import quantized

    path = tmp_path / "calibration.safetensors"
    write_calibration(folder, path, images=20, steps=10, seed=1)
    original, errors = Original(folder, images=10, steps=10), {}
    for method, given in (("minmax", None), ("gptq", path)):
        model = quantized(folder, given, bit_width=bits, group_size=32, method=method)
        errors[method] = original.distance(model.weights).noise
    print(errors)
    assert errors["gptq"] < 0.7 * errors["minmax"]


def _weights(quantized: Any, folder: Path, bits: int) -> dict[str, np.ndarray]:
    model = quantized(folder, bit_width=bits, group_size=32, method="minmax")
    assert len(model.layers) >= 14
    assert not any("embed" in name for name in model.layers)
    return dict(model.weights)


def test_ranges_that_follow_the_steps_cost_less_than_one(folder: Path) -> None:
    from digits.activations import WAYS, QuantizedInputs
    from digits.calibration import calibrate
    from digits.measuring import Original

    original = Original(folder, images=10, steps=20)
    calibration = calibrate(folder, images=20, steps=20, seed=1)
    layers = [name.removesuffix(".range") for name in calibration if name.endswith(".range")]
    layers = [name for name in layers if "embed" not in name and "conv_" not in name and "final" not in name]
    errors = {way: original.distance(inputs=QuantizedInputs(calibration, layers, 4, way)).noise for way in WAYS}
    print(errors)
    static, uniform, optimal, smooth, each = errors.values()
    assert each < 0.9 * static
    assert optimal < 0.9 * static
    assert optimal < 1.03 * uniform
    assert smooth < 1.03 * optimal
