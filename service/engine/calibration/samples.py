"""From raw samples of a layer's inputs to their statistics, reading only those that are used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.engine.calibration.calibration import Calibration, Layer
from service.engine.calibration.entries import CalibrationFile, Entry
from service.engine.tensors import Array, FloatArray
from service.engine.timesteps import Floats
from service.errors import InvalidCalibration

#: Of a file, read at once.
READ_BYTES = 8 << 20

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Choice:
    """Samples to use, by ascending index, each with its weight; all weights add up to 1."""

    indices: Indices
    weights: Floats


def choose(calibration: Calibration, layer: Layer, weights: Floats, most: int) -> Choice:
    """At most so many samples of each timestep, spread evenly over those there are; steps count by `weights` (T,)."""
    steps = _steps(calibration, layer)
    used, shares = [], []
    for step in np.flatnonzero(weights):
        there = np.flatnonzero(steps == step)
        picked = there[np.unique(np.linspace(0, len(there) - 1, min(most, len(there))).astype(np.int64))]
        used.append(picked)
        shares.append(np.full(len(picked), weights[step] / max(1, len(picked))))
    indices, share = np.concatenate(used), np.concatenate(shares)
    if not share.sum() > 0:
        raise InvalidCalibration(f"{layer.name}.samples has none of a timestep that counts")
    order = np.argsort(indices, kind="stable")
    return Choice(indices[order], share[order] / share.sum())


def read_chosen(file: CalibrationFile, entry: Entry, choice: Choice) -> Iterator[tuple[FloatArray, Floats]]:
    """The samples that were chosen, (k, in) float32, with their weights (k,), a piece at a time."""
    rows = max(1, READ_BYTES * entry.rows // max(1, entry.nbytes))
    position = 0
    while position < len(choice.indices):
        start = int(choice.indices[position])
        end = int(np.searchsorted(choice.indices, start + rows))
        stop = int(choice.indices[end - 1]) + 1
        piece = file.read(entry, start, stop)[choice.indices[position:end] - start]
        yield _as_float32(piece, entry.name), choice.weights[position:end]
        position = end


def _steps(calibration: Calibration, layer: Layer) -> Indices:
    """Of each sample, the index of its timestep."""
    count, known = layer.fields["samples"].rows, calibration.timesteps
    entry = layer.fields.get("sample_timestep")
    if entry is None:
        if len(known) > 1:
            raise InvalidCalibration(
                f"{layer.name}.samples are of {len(known)} timesteps: give .sample_timestep as well"
            )
        return np.zeros(count, np.int64)
    given = calibration.file.whole(entry).astype(np.float64)
    order = np.argsort(known)
    places = np.searchsorted(known[order], given).clip(max=len(known) - 1)
    found: Indices = order[places]
    if not np.array_equal(known[found], given):
        strange = given[known[found] != given][0]
        raise InvalidCalibration(f"{entry.name} names the step {strange:g}, which is none of `timesteps`")
    return found


def _as_float32(piece: Array, name: str) -> FloatArray:
    with np.errstate(over="ignore"):  # an infinity is refused
        x = piece.astype(np.float32)
    if not np.isfinite(x).all():
        raise InvalidCalibration(f"{name} holds a NaN, an infinity or a number too large for float32")
    return x
