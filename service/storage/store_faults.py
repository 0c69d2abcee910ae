"""Turns what stores answer into the errors that a user sees: never their own words, which may hold credentials."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

from service.errors import ArrowQuantError, InvalidConfig, ModelNotFound, StoreRefused, StoreUnavailable

_STATUS = re.compile(r"status code: (\d{3})")
#: What a client of the store may answer later: too many requests, a timeout, and whatever is the store's own fault.
_PASSING = frozenset({408, 425, 429})


def require(module: str, scheme: str, extra: str) -> ModuleType:
    """A library of an extra; raises InvalidConfig that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InvalidConfig(
            f"{scheme}:// needs the extra `{extra}`, which is not installed on this server: "
            f"pip install 'arrowquant-service[{extra}]'"
        ) from error


def status_in(error: Exception) -> int | None:
    """The HTTP status that an error of obstore's tells of."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def is_passing(status: int | None) -> bool:
    """Whether another attempt may succeed; without a status there was no answer."""
    return status is None or status >= 500 or status in _PASSING


def store_error(status: int | None, what: str, doing: str) -> ArrowQuantError:
    """The error for an answer with this status; `what` was asked for, and `doing` completes "while …"."""
    if status in (401, 403):
        return StoreRefused(
            f"the store refused this server {what}: the operator's credentials are missing or wrong, or do not reach it"
        )
    if status == 404:
        return ModelNotFound(f"the store has no {what}")
    told = f"answered with HTTP {status}" if status is not None else "could not be reached, or broke off"
    return StoreUnavailable(f"the store {told} while {doing}, after several attempts: try again when it is well")
