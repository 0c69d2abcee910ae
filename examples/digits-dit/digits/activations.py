"""Simulates a runtime whose layers see quantized inputs, with a grid for each layer and step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from digits.arrays import FloatArray
from service.engine.activation_ranges import clipped_ranges
from service.engine.time_smoothing import grids_at_steps, smoothed
from service.engine.timesteps import optimal_groups, uniform_groups

#: What is compared: how many groups (None for one per step), whether their cuts are optimal, `smoothness_weight`,
#: `boundary_window`.
WAYS: dict[str, tuple[int | None, bool, float, int]] = {
    "one static range": (1, True, 0.0, 0),
    "10 uniform groups": (10, False, 0.0, 0),
    "10 optimal groups": (10, True, 0.0, 0),
    "10 optimal groups, smoothed": (10, True, 0.01, 1),
    "a range per step": (None, True, 0.0, 0),
}


class QuantizedInputs:
    """A tap that rounds the inputs of some layers to a grid of 2**bits levels, which changes with the step."""

    def __init__(
        self,
        calibration: Mapping[str, np.ndarray],
        layers: Iterable[str],
        bits: int,
        way: str,
        *,
        is_clipped: bool = True,
    ) -> None:
        """A grid spans all that calibration saw at a step, or what is best where `is_clipped`."""
        self.top, self.step = 2**bits - 1, 0
        self._grids = {}
        for name in layers:
            ranges = calibration[f"{name}.range"]
            if is_clipped:
                ranges = clipped_ranges(ranges, calibration[f"{name}.mean_square"], bits)
            self._grids[name] = _grids(ranges, bits, way)

    def on_step(self, step: int) -> None:
        """What is seen from now on belongs to this step."""
        self.step = step

    def __call__(self, name: str, rows: FloatArray) -> FloatArray:
        """The inputs (rows, in) of a layer as they are after rounding."""
        if name not in self._grids:
            return rows
        scale, zero = (part[self.step] for part in self._grids[name])
        return (np.clip(np.rint(rows * (1 / scale)) + zero, 0, self.top) - zero) * scale


def _grids(ranges: np.ndarray, bits: int, way: str) -> tuple[FloatArray, FloatArray]:
    """Scale and zero point (T,) for each step."""
    count, is_optimal, smoothness_weight, window = WAYS[way]
    count = count or len(ranges)
    groups = optimal_groups(ranges, count, bits) if is_optimal else uniform_groups(ranges, count, bits)
    groups = smoothed(groups, ranges, smoothness_weight)
    scale, zero = grids_at_steps(groups, window, "linear")
    return scale.astype(np.float32), zero.astype(np.float32)
