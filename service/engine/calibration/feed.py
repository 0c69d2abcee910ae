"""What methods are handed of each layer: read when its turn comes, checked, and averaged over timesteps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from service.engine.activation_groups import MOST_CUTS
from service.engine.calibration.calibration import RANGE, Calibration, Layer
from service.engine.calibration.entries import Entry
from service.engine.calibration.samples import READ_BYTES, choose, read_chosen
from service.engine.inputs import LayerInputs
from service.engine.tensors import Array, FloatArray, TensorInfo
from service.engine.timesteps import Floats
from service.errors import InvalidCalibration

#: Elements of a Gram matrix that are read, or looked at, together.
TILE_ELEMENTS = 1 << 21
#: Of the largest element of its diagonal: by how much a Gram matrix may differ from its transpose.
SYMMETRY = 1e-3
#: Squares up to here are multiplied with weights in float32 without an overflow.
LARGEST = 1e24
#: For each two timesteps between which optimal groups may lie: what is computed of them.
CUT_BYTES = 32
#: Gram matrices that a layer holds: its own and what a method derives from it.
GRAMS_HELD = 3


@dataclass(frozen=True, slots=True)
class Averaging:
    """How much each timestep counts, (T,) with a sum of 1, and how many raw samples of each are used."""

    weights: Floats
    samples: int


class Feed:
    """Hands out the inputs of layers; keeps those of the last, which others may share."""

    def __init__(self, calibration: Calibration, averaging: Averaging) -> None:
        self.calibration = calibration
        self._averaging = averaging
        self._last: tuple[Layer, LayerInputs] | None = None

    @property
    def identity(self) -> list[Any]:
        """What has to be the same for a run to go on from what another did with it."""
        return [*self.calibration.identity, self._averaging.samples, *self._averaging.weights.tolist()]

    def inputs(self, info: TensorInfo) -> LayerInputs | None:
        """Those of the layer whose weights a tensor is; raises InvalidCalibration, and what reading raises."""
        layer = self.calibration.layer(info)
        if layer is None:
            return None
        if self._last is None or self._last[0] is not layer:
            self._last = None  # before the next is read, so that there is never more than one
            self._last = layer, self._read(layer, info)
        return self._last[1]

    def ranges(self, info: TensorInfo, scale: FloatArray | None = None) -> tuple[Floats, Floats]:
        """The smallest and the largest input (T, 2) of a layer that tells its range, and how much steps count (T,).

        Of inputs that are divided by `scale` (cols,), where that is given. A step at which the layer was not fed has
        0 for both. Raises what `inputs` raises.
        """
        layer = self.calibration.layer(info)
        assert layer is not None, "asked for where there are ranges"
        try:
            return self._ranges(layer, scale), self._step_weights(layer)
        except InvalidCalibration as error:
            error.tensor = info.name
            raise

    def mean_squares(self, info: TensorInfo, scale: FloatArray | None = None) -> Floats | None:
        """The mean square of a layer's inputs at each step, (T, in), if it is told; as `ranges` of divided ones."""
        layer = self.calibration.layer(info)
        if layer is None or "mean_square" not in layer.fields:
            return None
        try:
            squares: Floats = self._steps(layer.fields["mean_square"]).astype(np.float64)
        except InvalidCalibration as error:
            error.tensor = info.name
            raise
        return squares if scale is None else squares / np.square(scale.astype(np.float64))

    def held_bytes(self, info: TensorInfo) -> int:
        """What handing them out, and a method that uses them, may hold in memory."""
        layer = self.calibration.layer(info)
        if layer is None:
            return 0
        grams = GRAMS_HELD * 4 * info.cols**2 if "gram" in layer.tells else 0
        reads = max((self.calibration.file.held_bytes(entry) for entry in layer.fields.values()), default=0)
        steps = 32 * len(self.calibration.timesteps) * info.cols
        cuts = CUT_BYTES * min(len(self.calibration.timesteps), MOST_CUTS) ** 2 if RANGE in layer.tells else 0
        return grams + reads + steps + cuts + (2 * READ_BYTES if "samples" in layer.fields else 0) + 16 * TILE_ELEMENTS

    def _read(self, layer: Layer, info: TensorInfo) -> LayerInputs:
        try:
            return self._inputs(layer, info.cols)
        except InvalidCalibration as error:
            error.tensor = info.name
            raise

    def _inputs(self, layer: Layer, cols: int) -> LayerInputs:
        fields, weights = layer.fields, self._step_weights(layer)
        gram = self._gram(fields["gram"]) if "gram" in fields else None
        square = _averaged(self._steps(fields["mean_square"]), weights) if "mean_square" in fields else None
        largest = self._steps(fields["absmax"])[weights > 0].max(axis=0) if "absmax" in fields else None
        if "samples" in fields and "gram" not in fields:
            sampled = self._of_samples(layer, cols, weights)
            gram = sampled.gram
            square = sampled.mean_square if square is None else square
            largest = sampled.absmax if largest is None else largest
        return LayerInputs(cols, square, gram, largest)

    def _ranges(self, layer: Layer, scale: FloatArray | None) -> Floats:
        entry = layer.fields[RANGE]
        found: Floats = _float32(self.calibration.file.whole(entry)).astype(np.float64)
        if "count" in layer.fields:
            found[self.calibration.file.whole(layer.fields["count"]).astype(np.float64) == 0] = 0.0
        if not ((np.abs(found) <= LARGEST).all() and (found[:, 0] <= found[:, 1]).all()):
            raise InvalidCalibration(
                f"{entry.name} holds a NaN, a number beyond {LARGEST:g}, or a smallest input above the largest"
            )
        if scale is None:
            return found
        # Of a column only the largest size is known at each step; the signs are those of all inputs.
        largest = (self._steps(layer.fields["absmax"]).astype(np.float64) / scale).max(axis=1)
        return np.stack([np.where(found[:, 0] < 0, -largest, 0.0), np.where(found[:, 1] > 0, largest, 0.0)], axis=1)

    def _step_weights(self, layer: Layer) -> Floats:
        """Those of the timesteps at which the layer was fed."""
        weights = self._averaging.weights
        if (entry := layer.fields.get("count")) is None:
            return weights
        counts = self.calibration.file.whole(entry).astype(np.float64)
        if not (counts >= 0).all():
            raise InvalidCalibration(f"{entry.name} holds a NaN or a number below 0")
        fed: Floats = np.where(counts > 0, weights, 0.0)
        if not fed.sum() > 0:
            raise InvalidCalibration(f"{entry.name} says that the layer was fed at no timestep that counts")
        fed /= fed.sum()
        return fed

    def _steps(self, entry: Entry) -> FloatArray:
        """A line for each timestep, (T, in), none of its numbers below 0."""
        values = _float32(self.calibration.file.whole(entry))
        if not ((values >= 0) & (values <= LARGEST)).all():
            raise InvalidCalibration(f"{entry.name} holds a NaN, or a number below 0 or above {LARGEST:g}")
        return values

    def _gram(self, entry: Entry) -> FloatArray:
        cols = entry.rows
        gram = np.empty((cols, cols), np.float32)
        step = max(1, TILE_ELEMENTS // cols)
        for start in range(0, cols, step):
            gram[start : start + step] = _float32(self.calibration.file.read(entry, start, min(start + step, cols)))
        diagonal = np.diagonal(gram)
        if not ((diagonal >= 0) & (diagonal <= LARGEST)).all():
            raise InvalidCalibration(
                f"{entry.name} has a NaN, or a number below 0 or above {LARGEST:g}, on its diagonal"
            )
        allowed = SYMMETRY * float(diagonal.max())
        for start in range(0, cols, step):
            rows = gram[start : start + step]
            with np.errstate(over="ignore", invalid="ignore"):  # a comparison with a NaN is false
                apart = np.abs(rows - gram[:, start : start + step].T)
            if not (apart <= allowed).all():
                raise InvalidCalibration(f"{entry.name} is not symmetric, or holds a NaN or an infinity")
        return gram

    def _of_samples(self, layer: Layer, cols: int, weights: Floats) -> LayerInputs:
        choice = choose(self.calibration, layer, weights, self._averaging.samples)
        gram = np.zeros((cols, cols), np.float32) if "gram" in layer.tells else None
        square, largest = np.zeros(cols), np.zeros(cols, np.float32)
        for x, share in read_chosen(self.calibration.file, layer.fields["samples"], choice):
            scaled = x * np.sqrt(share).astype(np.float32)[:, None]
            square += np.einsum("ij,ij->j", scaled, scaled, dtype=np.float64)
            np.maximum(largest, np.abs(x).max(axis=0), out=largest)
            if gram is not None:
                with np.errstate(over="ignore", invalid="ignore"):  # what is too large is refused below
                    gram += scaled.T @ scaled
        if not square.max() <= LARGEST:
            raise InvalidCalibration(f"{layer.name}.samples has squares above {LARGEST:g}")
        return LayerInputs(cols, square.astype(np.float32), gram, largest)


def _averaged(values: FloatArray, weights: Floats) -> FloatArray:
    return (weights @ values).astype(np.float32)


def _float32(values: Array) -> FloatArray:
    with np.errstate(over="ignore"):  # an infinity is refused
        return values.astype(np.float32)
