"""How far a quantized network is from the one it was: along the run of the original, and in the images it draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from digits.activations import QuantizedInputs
from digits.arrays import FloatArray
from digits.layers import untouched
from digits.networks import load
from digits.sampler import Drawing, labels_for, predict_along, relative_error, sample

SEED = 7  # another noise than calibration begins with


@dataclass(frozen=True, slots=True)
class Distance:
    """Relative errors: of the noise in all steps together, in each step (steps,), and of the images drawn."""

    noise: float
    by_step: FloatArray
    images: float
    drawn: FloatArray  # (n, 8, 8)


class Original:
    """A model as it was trained, and a sampling run of it."""

    def __init__(self, folder: Path, images: int, steps: int) -> None:
        self.folder = folder
        self.run: Drawing = sample(load(folder), labels_for(images), steps, SEED)

    def distance(
        self, weights: Mapping[str, FloatArray] | None = None, inputs: QuantizedInputs | None = None
    ) -> Distance:
        """Of the model with other weights, with rounded inputs of layers, or with both."""
        network = load(self.folder, weights, inputs or untouched)
        on_step = inputs.on_step if inputs else lambda _: None
        noise = predict_along(network, self.run, on_step)
        drawn = sample(network, self.run.labels, len(self.run.steps), SEED, on_step).images
        by_step = [relative_error(*pair) for pair in zip(self.run.noise, noise, strict=True)]
        return Distance(
            relative_error(self.run.noise, noise), np.array(by_step), relative_error(self.run.images, drawn), drawn
        )
