"""Schemes by their public ids."""

from __future__ import annotations

from typing import Any

from service.engine.discovery import subclasses
from service.engine.schemes.base import Scheme


def schemes() -> dict[str, type[Scheme]]:
    """Every scheme id with the class that implements it."""
    return {id_: cls for cls in subclasses(__package__, Scheme) for id_ in cls.ids}


def build_scheme(id_: str, *, symmetric: bool, **parameters: Any) -> Scheme:
    """The scheme of this id; raises KeyError when there is none, ValueError when the parameters do not fit."""
    cls = schemes()[id_]
    return cls.of(cls.ids[id_], symmetric=symmetric, **parameters)
