"""AWQ (Lin et al. 2023): columns that are fed more get finer steps, by scaling them before they are rounded.

The scales are the engine's to find, see `equalise.best_scale`: they belong to a layer, and codes to its rows. What is
scaled is then quantized as `mse` does it. The layer's inputs are to be divided by the scales, which are stored.
"""

from __future__ import annotations

from typing import Any, ClassVar

from service.engine.methods.base import Method
from service.engine.methods.mse import Mse
from service.engine.schemes.base import AnyArray, Scheme


class Awq(Method):
    """No parameters."""

    id: ClassVar[str] = "awq"
    needs: ClassVar[tuple[str, ...]] = ("mean_square",)
    scales_inputs: ClassVar[bool] = True

    @property
    def quantizes_as(self) -> Method:
        """`mse`, of weights that are scaled already."""
        return Mse()

    def find(self, xp: Any, x: AnyArray, scheme: Scheme, weights: AnyArray | None = None) -> tuple[AnyArray, AnyArray]:
        """See `quantizes_as`."""
        return Mse().find(xp, x, scheme, weights)
