"""Round to nearest on the range of the group."""

from __future__ import annotations

from typing import Any, ClassVar

from service.engine.methods.base import Method
from service.engine.schemes.base import AnyArray, Scheme


class MinMax(Method):
    """The grid spans the group's smallest and largest weight. No parameters."""

    id: ClassVar[str] = "minmax"
    is_weighted: ClassVar[bool] = False

    def find(self, xp: Any, x: AnyArray, scheme: Scheme, weights: AnyArray | None = None) -> tuple[AnyArray, AnyArray]:
        """An element of weight 0 does not count; all others count alike."""
        counted = x if weights is None else xp.where(weights > 0, x, 0.0)
        return scheme.grid(xp, xp.minimum(xp.min(counted, axis=-1), 0), xp.maximum(xp.max(counted, axis=-1), 0))
