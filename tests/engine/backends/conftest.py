"""Two CUDA devices that are made of fibers."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.engine.backends.cupy_device import _found
from tests.engine.backends.fiber_cuda import FiberCuda


@pytest.fixture(scope="session")
def home() -> Path:
    """Below which compiled kernels are kept, for later runs as well: their names tell what they were made from."""
    folder = Path(tempfile.gettempdir()) / "arrowquant-home"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def look_again() -> Iterator[None]:
    """What this process has found of devices is forgotten, before and after."""
    _found.cache_clear()
    yield
    _found.cache_clear()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, home: Path, look_again: None) -> FiberCuda:  # noqa: ARG001
    """What `import cupy` gives while a test runs."""
    made = FiberCuda(devices=2)
    monkeypatch.setitem(sys.modules, "cupy", made)
    monkeypatch.setenv("HOME", str(home))
    return made
