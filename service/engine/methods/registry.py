"""Methods by their public ids."""

from __future__ import annotations

from service.engine.discovery import subclasses
from service.engine.methods.base import Method


def methods() -> dict[str, type[Method]]:
    """Every method id with the class that implements it."""
    return {cls.id: cls for cls in subclasses(__package__, Method)}
