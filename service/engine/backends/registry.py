"""Backends by their public ids."""

from __future__ import annotations

from service.engine.backends.base import Backend
from service.engine.discovery import subclasses
from service.errors import InvalidConfig

#: What `auto` tries, fastest first.
PREFERENCE = ("cuda", "cpu", "reference")


def backends() -> dict[str, type[Backend]]:
    """Every backend id with the class that implements it."""
    return {cls.id: cls for cls in subclasses(__package__, Backend)}


def choose_backend(id_: str) -> str:
    """The id that `auto` stands for here, or `id_` itself; raises InvalidConfig when it cannot run."""
    known = backends()
    if id_ == "auto":
        return next(name for name in PREFERENCE if name in known and known[name].unavailable() is None)
    if id_ not in known:
        raise InvalidConfig(f"backend {id_!r} does not exist; there are auto, {', '.join(known)}", pointer="/backend")
    if reason := known[id_].unavailable():
        raise InvalidConfig(f"backend {id_!r} cannot run on this server: {reason}", pointer="/backend")
    return id_
