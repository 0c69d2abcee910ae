"""A low-rank part in 16 bits beside the codes, W = L1·L2 + R (LQER, Zhang et al. 2024; SVDQuant, Li et al. 2024).

The parts are the engine's to find, see `low_rank.py`: one of them belongs to the layer, and codes to its rows. What is
left of the weights is quantized as `mse` does it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from service.engine.methods.base import MAX_RANK, MIN_RANK, Method
from service.engine.methods.mse import Mse
from service.engine.schemes.base import AnyArray, Scheme


class Svd(Method):
    """The rank is that of the low-rank part."""

    id: ClassVar[str] = "svd"
    rank: int = Field(default=32, ge=MIN_RANK, le=MAX_RANK, description="Of the low-rank part.")

    @property
    def low_rank(self) -> int:
        """As it is chosen."""
        return self.rank

    @property
    def quantizes_as(self) -> Method:
        """`mse`, of what the low-rank part leaves."""
        return Mse()

    def find(self, xp: Any, x: AnyArray, scheme: Scheme, weights: AnyArray | None = None) -> tuple[AnyArray, AnyArray]:
        """See `quantizes_as`."""
        return Mse().find(xp, x, scheme, weights)
