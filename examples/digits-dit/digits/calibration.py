"""Collects what the service wants to know of each layer's inputs, over whole sampling runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from digits.arrays import FloatArray
from digits.networks import load
from digits.sampler import labels_for, sample


class InputStatistics:
    """A tap that changes nothing and keeps, of each layer's inputs, what a calibration file holds."""

    def __init__(self, steps: int) -> None:
        self.steps, self.step = steps, 0
        self._layers: dict[str, _Layer] = {}

    def on_step(self, step: int) -> None:
        """What is seen from now on belongs to this step."""
        self.step = step

    def __call__(self, name: str, rows: FloatArray) -> FloatArray:
        """Take note of the inputs (rows, in) of a layer."""
        if name not in self._layers:
            self._layers[name] = _Layer(self.steps, rows.shape[1])
        self._layers[name].add(self.step, rows)
        return rows

    def arrays(self) -> dict[str, np.ndarray]:
        """The file's tensors but for `timesteps`."""
        return {f"{name}.{part}": x for name, layer in self._layers.items() for part, x in layer.arrays().items()}


class _Layer:
    """Of the inputs of one layer: sums over all steps for the Gram matrix, for each step for the rest."""

    def __init__(self, steps: int, cols: int) -> None:
        self.products = np.zeros((cols, cols))
        self.squares = np.zeros((steps, cols))
        self.absmax = np.zeros((steps, cols), np.float32)
        self.range = np.tile(np.array([np.inf, -np.inf], np.float32), (steps, 1))
        self.count = np.zeros(steps, np.int64)

    def add(self, step: int, rows: FloatArray) -> None:
        """Inputs (rows, in) at a step."""
        self.products += rows.T @ rows
        self.squares[step] += np.square(rows).sum(axis=0, dtype=np.float64)
        self.absmax[step] = np.maximum(self.absmax[step], np.abs(rows).max(axis=0))
        low, high = self.range[step]
        self.range[step] = min(low, rows.min()), max(high, rows.max())
        self.count[step] += len(rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """Means and extremes, under the names that the service looks for."""
        return {
            "gram": (self.products / self.count.sum()).astype(np.float32),
            "mean_square": (self.squares / self.count[:, None]).astype(np.float32),
            "absmax": self.absmax,
            "range": self.range,
            "count": self.count,
        }


def calibrate(folder: Path, images: int, steps: int, seed: int) -> dict[str, np.ndarray]:
    """The calibration of the model in `folder`, from drawing so many images in so many steps."""
    seen = InputStatistics(steps)
    run = sample(load(folder, tap=seen), labels_for(images), steps, seed, seen.on_step)
    return {"timesteps": run.steps} | seen.arrays()


def write_calibration(folder: Path, path: Path, *, images: int, steps: int, seed: int) -> None:
    """Write it as the safetensors file that the service takes."""
    save_file(calibrate(folder, images, steps, seed), path)
