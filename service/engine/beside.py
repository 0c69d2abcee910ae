"""What is stored of a layer beside its codes, for runtimes that make use of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.engine.tensors import FloatArray, HalfArray


@dataclass(frozen=True, eq=False, slots=True)
class Beside:
    """Parts that a layer may have; what is None it has not.

    input_scale            (cols,) float32, above 0: codes are of the weights times it, column by column, and a runtime
                           divides the layer's inputs by it
    time_group_bounds      (groups + 1,): a group of the timesteps of calibration begins at each but the last
    activation_scale       (groups,) float32: of the grid to which the layer's inputs may be rounded in a group
    activation_zero_point  (groups,) float32, whole numbers
    low_rank_down          (r, cols) float16: times `up` of rows, it is to be added to what their codes stand for
    """

    input_scale: FloatArray | None = None
    time_group_bounds: npt.NDArray[np.uint32] | None = None
    activation_scale: FloatArray | None = None
    activation_zero_point: FloatArray | None = None
    low_rank_down: HalfArray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the small ones."""
        return sum(value.nbytes for name in CELLS if (value := getattr(self, name)) is not None)

    def cells(self) -> dict[str, Any]:
        """The small parts as JSON, without what it has not."""
        return {name: value.tolist() for name in CELLS if (value := getattr(self, name)) is not None}


#: What there may be, by name.
PARTS = tuple(Beside.__dataclass_fields__)
#: All but the matrix.
CELLS = tuple(name for name in PARTS if name != "low_rank_down")
