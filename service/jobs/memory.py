"""Gives freed memory back to the system: allocators keep what a large job has used."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import pyarrow as pa


def release_memory() -> None:
    """Return what is free to the system, as far as the allocators here can."""
    pa.default_memory_pool().release_unused()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """glibc's function; other C libraries have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
