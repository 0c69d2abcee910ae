"""What calibration tells of the inputs of a layer, averaged over samples and timesteps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np

from service.engine.tensors import FloatArray

#: Of the mean over columns: a column counts for so much at least, so that one that is never fed keeps its size.
SMALLEST_WEIGHT = 1e-6

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Statistics of the inputs x (cols,) of a layer y = W x; all row slices of a tensor share one.

    mean_square  (cols,), E[x_j²]; the diagonal of the Gram matrix where only that is given
    gram         (cols, cols) float32, E[x xᵀ], symmetric
    absmax       (cols,), the largest |x_j|
    """

    cols: int
    mean_square: FloatArray | None = None
    gram: FloatArray | None = None
    absmax: FloatArray | None = None
    _kept: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mean_square is None and self.gram is not None:
            object.__setattr__(self, "mean_square", np.ascontiguousarray(np.diagonal(self.gram)))

    @property
    def weights(self) -> FloatArray | None:
        """How much the squared error of each column counts, (cols,) with a mean of about 1, all above 0."""
        return None if self.mean_square is None else self.once("weights", self._weights)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned for this key, which is called once and kept as long as this is; thread-safe."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            return cast(T, self._kept[key])

    def _weights(self) -> FloatArray:
        assert self.mean_square is not None, "asked for where there is one"
        square = self.mean_square.astype(np.float64)
        mean = float(square.mean())
        weights = square / mean if mean > 0 else np.ones_like(square)
        return np.maximum(weights, SMALLEST_WEIGHT).astype(np.float32)
