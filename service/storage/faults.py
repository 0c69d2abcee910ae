"""Turns what the operating system says about files into the errors that a user sees."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import ArrowQuantError, DiskFull, StorageFailure

#: No space, and no space that this user may still use.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def storage_error(error: OSError, doing: str) -> ArrowQuantError:
    """The DiskFull or StorageFailure that an OSError means; `doing` completes "failed while …"."""
    if error.errno in _FULL:
        return DiskFull(f"there was no space left while {doing}: free some and try again")
    # Never str(error): it holds the server's path.
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return StorageFailure(f"the system reported {reason!r} while {doing}")


@contextmanager
def storage_faults(doing: str) -> Iterator[None]:
    """Raise DiskFull or StorageFailure in place of an OSError; `doing` is such as "writing the report"."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, doing) from error
