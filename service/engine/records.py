"""Dataclasses of which a model has hundreds of thousands: frozen for the type checker, and made as fast as can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:
    T = TypeVar("T")

    def record(*, frozen: bool, slots: bool) -> Callable[[type[T]], type[T]]:
        """As `dataclass`; that no field is set later is checked before it runs, for each check makes it slower."""
        return dataclass(slots=slots, unsafe_hash=frozen)


__all__ = ["record"]
