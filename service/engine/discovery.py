"""Extensions are found by importing every module of a package: that is all the registration there is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def subclasses(package: str, base: type[T]) -> list[type[T]]:
    """Every concrete subclass of `base` that a module of `package` defines, in order of module name."""
    return [cls for cls in _classes(package) if issubclass(cls, base) and cls is not base]


@cache  # registries are asked several times a tensor
def _classes(package: str) -> tuple[type[Any], ...]:
    """Every concrete class that the modules of `package` define."""
    return tuple(
        value
        for module in _modules(package)
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not inspect.isabstract(value)
    )


def _modules(package: str) -> list[ModuleType]:
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return [importlib.import_module(f"{package}.{m.name}") for m in found if not m.ispkg]
