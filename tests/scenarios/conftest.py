"""Models with random weights, under the root that the servers may read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.helpers import save_folder

NewModel = Callable[..., Path]
Weights = Callable[..., np.ndarray]


@pytest.fixture
def place(model_root: Path, tmp_path: Path) -> Path:
    """A folder of this test's own that servers may read from and write to."""
    folder = model_root / tmp_path.name
    folder.mkdir()
    return folder


@pytest.fixture
def weights(rng: np.random.Generator) -> Weights:
    """Random matrices as trained ones are: normal, with a few large values and an offset per row."""

    def draw(*shape: int, dtype: Any = np.float32) -> np.ndarray:
        x = rng.standard_normal(shape, np.float32) * np.float32(0.04)
        x += rng.standard_normal((shape[0], *[1] * (len(shape) - 1)), np.float32) * np.float32(0.005)
        return x.astype(dtype)

    return draw


@pytest.fixture
def new_model(place: Path, weights: Weights) -> NewModel:
    """Writes model folders: given tensors, or so many layers of this shape."""
    numbers = count()

    def write(
        tensors: Mapping[str, np.ndarray] | None = None, *, layers: int = 3, shape: tuple[int, int] = (96, 256)
    ) -> Path:
        if tensors is None:
            tensors = {f"blocks.{i:03}.weight": weights(*shape) for i in range(layers)}
        return save_folder(place / f"model-{next(numbers)}", tensors)

    return write
