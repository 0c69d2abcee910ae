"""What a layer's inputs are divided by, and its weights multiplied with, before these are rounded.

Columns that are fed more get finer steps: s_j = a_j^α (AWQ, Lin et al. 2023) and s_j = a_j^α / w_j^(1-α) (SmoothQuant,
Xiao et al. 2022; AWQ's duo scaling), with the magnitudes a of the inputs and w of the weights of each column. Of all
these the one is taken whose output error is least, measured exactly from the Gram matrix on some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from service.engine.backends.base import Backend, Grid
from service.engine.inputs import LayerInputs
from service.engine.methods.base import Method
from service.engine.methods.minmax import MinMax
from service.engine.schemes.base import Scheme
from service.engine.tensors import Array, FloatArray, QuantizedRows

#: Quantizes rows of weights, and gives back what is then stored.
RoundTrip = Callable[[FloatArray], FloatArray]
Floats = npt.NDArray[np.float64]

#: Rows on which scales are tried.
TRIAL_ROWS = 64
#: α that are tried; 0 of the first form would change nothing.
ALPHAS = tuple(step / 20 for step in range(1, 21))
#: No column is stretched or shrunk by more against the mean one.
LARGEST = 1e4


@dataclass(frozen=True, eq=False, slots=True)
class Stretch:
    """Weights multiplied by `scale` (cols,), column by column, for inputs that are divided by it."""

    scale: FloatArray
    inputs: LayerInputs

    @classmethod
    def of(cls, x: Array, scheme: Scheme, inputs: LayerInputs, backend: Backend) -> Stretch | None:
        """The best for a layer of which x (rows, cols) are some rows; None where nothing gains."""
        rows = x.astype(np.float32)
        if not np.isfinite(rows).all():
            return None  # the run itself tells of it
        scale = best_scale(rows, inputs, lambda stretched: _round_trip(stretched, scheme, backend))
        return None if scale is None else cls(scale, divided(inputs, scale))

    def apply(self, x: Array) -> FloatArray:
        """Rows as they are to be quantized."""
        return np.multiply(x.astype(np.float32), self.scale)

    def quantize(self, x: Array, scheme: Scheme, method: Method, grid: Grid | None, backend: Backend) -> QuantizedRows:
        """`backend.quantize` of rows x (rows, cols), whose errors are then of x itself."""
        rows = backend.quantize(self.apply(x), scheme, method, grid, self.inputs)
        if not rows.errors.finite:
            return rows
        read = backend.dequantize(rows)
        read /= self.scale
        # Weights and inputs are scaled against each other: the error of the output is the same.
        output = {name: getattr(rows.errors, name) for name in ("out_xx", "out_yy", "out_xy", "out_dd")}
        return replace(rows, errors=replace(backend.compare(x, read), **output))


def best_scale(x: FloatArray, inputs: LayerInputs, round_trip: RoundTrip) -> FloatArray | None:
    """Scales (cols,) of the inputs for a layer of which x (rows, cols) are some rows; None where nothing gains.

    `inputs` know their mean square.
    """
    best, least = None, _error(x, inputs, round_trip)
    for scale in scales(x, inputs):
        error = _error(x * scale, divided(inputs, scale), round_trip)
        if error < least:
            best, least = scale, error
    return best


def scales(x: FloatArray, inputs: LayerInputs) -> Iterator[FloatArray]:
    """All that are tried, each (cols,) float32 with 1 midway between its ends."""
    assert inputs.mean_square is not None, "the method needs it"
    fed = np.sqrt(inputs.mean_square.astype(np.float64))
    peaks = fed if inputs.absmax is None else inputs.absmax.astype(np.float64)
    weights = np.abs(x).max(axis=0).astype(np.float64)
    for alpha in ALPHAS:
        yield _normalised(_magnitude(fed) ** alpha)
        yield _normalised(_magnitude(peaks) ** alpha / _magnitude(weights) ** (1 - alpha))


def divided(inputs: LayerInputs, scale: FloatArray) -> LayerInputs:
    """The inputs after each column was divided by its scale."""
    return LayerInputs(
        inputs.cols,
        mean_square=None if inputs.mean_square is None else inputs.mean_square / scale**2,
        gram=None if inputs.gram is None else inputs.gram / scale[:, None] / scale,
        absmax=None if inputs.absmax is None else inputs.absmax / scale,
    )


def _magnitude(values: Floats) -> Floats:
    """Without zeros: a column that is never fed, or has no weights, is as a mean one."""
    positive = values > 0
    return np.where(positive, values, values[positive].mean() if positive.any() else 1.0)


def _normalised(scale: Floats) -> FloatArray:
    centred: Floats = np.clip(scale / np.sqrt(scale.max() * scale.min()), 1 / LARGEST, LARGEST)
    return centred.astype(np.float32)


def _round_trip(x: FloatArray, scheme: Scheme, backend: Backend) -> FloatArray:
    """What comes back of rows that are rounded to the nearest: to tell scales apart that is enough."""
    grid = backend.tensor_grid(backend.observe(x), scheme, MinMax()) if scheme.takes_pass else None
    return backend.dequantize(backend.quantize(x, scheme, MinMax(), grid))


def _error(x: FloatArray, inputs: LayerInputs, round_trip: RoundTrip) -> float:
    """The squared error of the output of these rows, over the inputs."""
    error = x - round_trip(x)
    if inputs.gram is not None:
        return float(np.einsum("ij,ij->", error @ inputs.gram, error, dtype=np.float64))
    assert inputs.mean_square is not None, "the method needs it"
    return float((error.astype(np.float64) ** 2 @ inputs.mean_square).sum())
