"""Extensions are found by importing every module of a package: that is all the registration there is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


@cache
def _modules(package: str) -> tuple[ModuleType, ...]:
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return tuple(importlib.import_module(f"{package}.{m.name}") for m in found if not m.ispkg)


def subclasses(package: str, base: type[T]) -> list[type[T]]:
    """Every concrete subclass of `base` that a module of `package` defines, in order of module name."""
    found: list[type[T]] = []
    for module in _modules(package):
        for value in vars(module).values():
            is_extension = inspect.isclass(value) and issubclass(value, base) and value is not base
            if is_extension and value.__module__ == module.__name__ and not inspect.isabstract(value):
                found.append(value)
    return found
