"""Memory that stays: gives back what a job has used, and sets aside what the garbage collector need not look at."""

from __future__ import annotations

import ctypes
import gc
from functools import cache
from typing import Any

import pyarrow as pa

#: `M_ARENA_MAX` of glibc's malloc.h, and how many heaps threads may share.
_ARENA_MAX = -8
ARENAS = 2
#: Objects more than there were, when the collector looks at the new ones; and after how many such looks at older ones.
YOUNG, OLDER = 10_000, 4


def limit_arenas() -> None:
    """Have threads share few heaps; call it before there are threads.

    Each job runs in a thread of its own, and glibc gives up to eight heaps a core to them, each of which keeps as much
    as a job has ever needed in it. Large arrays do not lie there, so sharing costs no speed.
    """
    mallopt = _of_libc("mallopt")
    if mallopt is not None:
        mallopt(_ARENA_MAX, ARENAS)


def release_memory() -> None:
    """Return what is free to the system, as far as the allocators here can."""
    pa.default_memory_pool().release_unused()
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def set_aside() -> None:
    """Have the garbage collector never again look at what there is now: modules, and what a compiler has made.

    A full collection stops all threads, the event loop among them, for as long as it looks: with a compiler loaded a
    tenth of a second. It also looks less often then: of a model of 100,000 tensors everything stays until it is done,
    and a third of the time went into looking at it again and again.
    """
    gc.freeze()
    gc.set_threshold(YOUNG, OLDER, OLDER)


@cache
def _of_libc(name: str) -> Any:
    """A function of glibc's; other C libraries may have none."""
    return getattr(ctypes.CDLL(None), name, None)
