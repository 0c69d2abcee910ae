"""What a method is: the way from a group of weights to the scale and zero point of a scheme."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from service.engine.schemes.base import AnyArray, Scheme


class Method(BaseModel):
    """Base of all methods. Frozen, hashable, and equal when their parameters are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: The public name; also the module's.
    id: ClassVar[str]

    @abstractmethod
    def find(self, xp: Any, x: AnyArray, scheme: Scheme, weights: AnyArray | None = None) -> tuple[AnyArray, AnyArray]:
        """Scale and zero point (...,), float32 as stored, for groups x (..., g) float32.

        `weights` (broadcastable to x) say how much the squared error of each element counts.
        """
