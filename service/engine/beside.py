"""What is stored of a layer beside its codes, for runtimes that make use of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.engine.tensors import FloatArray


@dataclass(frozen=True, eq=False, slots=True)
class Beside:
    """Parts that a layer may have; what is None it has not.

    input_scale            (cols,) float32, above 0: codes are of the weights times it, column by column, and a runtime
                           divides the layer's inputs by it
    time_group_bounds      (groups + 1,): a group of the timesteps of calibration begins at each but the last
    activation_scale       (groups,) float32: of the grid to which the layer's inputs may be rounded in a group
    activation_zero_point  (groups,) float32, whole numbers
    """

    input_scale: FloatArray | None = None
    time_group_bounds: npt.NDArray[np.uint32] | None = None
    activation_scale: FloatArray | None = None
    activation_zero_point: FloatArray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(value.nbytes for name in PARTS if (value := getattr(self, name)) is not None)

    def cells(self) -> dict[str, Any]:
        """As JSON, without what it has not."""
        return {name: value.tolist() for name in PARTS if (value := getattr(self, name)) is not None}


#: What there may be, by name.
PARTS = tuple(Beside.__dataclass_fields__)
