"""The codes of all errors, by which a client tells them apart."""

from __future__ import annotations

import inspect

from service import errors
from service.api import http_errors
from service.errors import ArrowQuantError

#: Branches of the tree that are never raised themselves.
_BRANCHES = frozenset(
    {errors.ArrowQuantError, errors.RequestError, errors.ModelError, errors.RunError, errors.ServiceError}
)


def _concrete() -> list[type[ArrowQuantError]]:
    found = [
        cls
        for module in (errors, http_errors)
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, ArrowQuantError) and cls not in _BRANCHES
    ]
    return sorted(found, key=lambda cls: cls.code)


#: Every error that a client can meet, by code.
CODES: dict[str, type[ArrowQuantError]] = {cls.code: cls for cls in _concrete()}
