"""Kernels that are compiled once and kept on disk until the code they are made of changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

from numba import njit

from service.engine.schemes import base, codebook, minifloat, nested, nested_search


@cache
def sources() -> str:
    """Digest of all files whose code or constants end up in a kernel."""
    constants = (Path(str(module.__file__)) for module in (base, codebook, minifloat, nested, nested_search))
    files = [*sorted(Path(__file__).parent.glob("*.py")), *constants]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile with the disk cache.

    Numba asks only whether the function's own file changed, and what its closure holds. A kernel is
    made of many files, so their digest becomes a closed-over variable, which no line reads.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_freevars=("sources",))
    aware = FunctionType(code, function.__globals__, function.__name__, None, (CellType(sources()),))
    aware.__qualname__, aware.__doc__ = function.__qualname__, function.__doc__
    return njit(nogil=True, cache=True, error_model="numpy")(aware)
