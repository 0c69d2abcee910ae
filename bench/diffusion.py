"""What quantizing does to two small diffusion models: the noise that they predict and the images that they draw.

The models are those of `examples/digits-dit`, and so is all that runs them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.numpy import save_file

from bench.common import RESULTS, note, table, write_result
from service.engine.methods.registry import methods

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits-dit"
sys.path.insert(0, str(EXAMPLE))

from digits.activations import WAYS, QuantizedInputs  # noqa: E402
from digits.calibration import calibrate  # noqa: E402
from digits.measuring import Distance, Original  # noqa: E402
from digits.picture import draw  # noqa: E402
from digits.quantized import QuantizedModel, quantized  # noqa: E402

TITLES = {"dit": "Diffusion transformer", "unet": "UNet"}
BITS, INPUT_BITS = (8, 6, 4, 3, 2), (8, 4)
GROUP_SIZE = 32
IMAGES, STEPS = 40, 50
INTRODUCTION = f"""
Figures are relative errors of the predicted noise: over all steps of a sampling run of the original ({IMAGES} images,
{STEPS} steps of DDIM), distance of the two predictions as a share of the original's length; both see the same images.
In brackets stands the relative error of the images that each draws on its own in the end, from the same noise.
Weights are in groups of {GROUP_SIZE} with a zero point, layers as the plan chooses them; *counted* are the bits of a
weight with its scales. Calibration is of {IMAGES} other images. Inputs are rounded where weights are, to a grid for
the layer at that step; the ranges that groups of steps have together are either all that calibration saw, or what has
the least expected error at each step (`service/engine/activation_ranges.py`), as it is in the last table."""


def main() -> None:
    """Measure both models, write the page."""
    parts = [INTRODUCTION]
    for name, title in TITLES.items():
        parts += [f"## {title}", *_Model(name).sections()]
    write_result("diffusion", "Diffusion models, quantized", *parts)


def ways() -> Iterator[tuple[str, str, bool]]:
    """A label, a method, and whether it has calibration: each method that stores nothing but codes and scales."""
    for name, method in sorted(methods().items()):
        if method().low_rank:
            continue
        if not method.needs:
            yield name, name, False
        if method.is_weighted:
            yield f"{name}, calibrated", name, True


class _Model:
    """All that is measured of one model."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.original = Original(EXAMPLE / name, IMAGES, STEPS)
        self.calibration = calibrate(EXAMPLE / name, IMAGES, STEPS, seed=1)
        self.best: dict[int, tuple[QuantizedModel, Distance, str]] = {}
        self.alone: dict[str, Distance] = {}

    def sections(self) -> Iterator[str]:
        """Tables and the picture."""
        yield "### Weights alone"
        yield self.weights()
        yield "### Inputs of the layers alone"
        yield self.inputs()
        yield "### Weights, by the method that is best for them, and inputs"
        yield self.both()
        picture = f"diffusion-{self.name}.png"
        self.picture(RESULTS / picture)
        yield f"![Images drawn, and errors along the run]({picture})"

    def weights(self) -> str:
        """Error by method and width."""
        rows = []
        with TemporaryDirectory() as folder:
            path = Path(folder) / "calibration.safetensors"
            save_file(self.calibration, path)
            for bits in BITS:
                note(f"{self.name}: weights at {bits} bits")
                models = {label: self.quantized(bits, method, path if fed else None) for label, method, fed in ways()}
                distances = {label: self.original.distance(model.weights) for label, model in models.items()}
                label = min(distances, key=lambda each: distances[each].noise)
                self.best[bits] = models[label], distances[label], label
                counted = f"{models[label].bits_per_weight:.2f}"
                rows.append([bits, counted, *map(_cell, distances.values())])
        return table(["bits", "counted", *distances], rows)

    def quantized(self, bits: int, method: str, calibration: Path | None) -> QuantizedModel:
        """The weights at a width, as they read back."""
        config = {"bit_width": bits, "group_size": GROUP_SIZE, "method": method, "enable_time_aware": False}
        return quantized(EXAMPLE / self.name, calibration, **config)

    def inputs(self) -> str:
        """Error by grouping and width, with the weights as they were."""
        rows = []
        for bits in INPUT_BITS:
            note(f"{self.name}: inputs at {bits} bits")
            whole = [self.original.distance(inputs=self._tap(bits, way, is_clipped=False)) for way in WAYS]
            rows.append([bits, "all that was seen", *map(_cell, whole)])
            found = {f"{bits} bits, {way}": self.original.distance(inputs=self._tap(bits, way)) for way in WAYS}
            rows.append([bits, "of least error", *map(_cell, found.values())])
            self.alone |= found
        return table(["bits of inputs", "ranges of steps", *WAYS], rows)

    def both(self) -> str:
        """Error by width of weights, width of inputs and grouping."""
        rows = []
        for bits, (model, _, method) in self.best.items():
            note(f"{self.name}: weights at {bits} bits, and inputs")
            for input_bits in INPUT_BITS:
                cells = [_cell(self.original.distance(model.weights, self._tap(input_bits, way))) for way in WAYS]
                rows.append([f"{bits} ({method})", input_bits, *cells])
        return table(["bits of weights", "of inputs", *WAYS], rows)

    def picture(self, path: Path) -> None:
        """What is drawn with weights of each width, and where in the run inputs cost most."""
        rows = {"original": self.original.run.images}
        rows |= {f"weights {bits} bits, {method}": each.drawn for bits, (_, each, method) in self.best.items()}
        few = f"{INPUT_BITS[-1]} bits, "
        ways = {name.removeprefix(few): each for name, each in self.alone.items() if name.startswith(few)}
        rows |= {f"inputs {few}{way}": each.drawn for way, each in ways.items()}
        curves = {f"weights {bits} bits": each.by_step for bits, (_, each, _) in self.best.items()}
        curves |= {f"inputs {few}{way}": each.by_step for way, each in ways.items() if "smoothed" not in way}
        draw(rows, curves, self.original.run.steps, path)

    def _tap(self, bits: int, way: str, *, is_clipped: bool = True) -> QuantizedInputs:
        layers = self.best[BITS[0]][0].layers
        return QuantizedInputs(self.calibration, layers, bits, way, is_clipped=is_clipped)


def _cell(distance: Distance) -> str:
    return f"{distance.noise:.4f} ({distance.images:.3f})"


if __name__ == "__main__":
    main()
