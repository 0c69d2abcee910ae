"""A small model, and a job on it that has succeeded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.api.keyed import Keyed
from tests.server import Server, body

LAYERS = 6


def save_model(folder: Path, *, layers: int = LAYERS, rows: int = 64, cols: int = 256, seed: int = 0) -> Path:
    """A model folder of a few linear layers."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"blocks.{i}.weight": rng.standard_normal((rows, cols), np.float32) for i in range(layers)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


@pytest.fixture(scope="session")
def model(model_root: Path) -> Path:
    """A model of six layers under the model root."""
    return save_model(model_root / "small")


@pytest.fixture(scope="session")
def finished(server: Server, model: Path) -> dict[str, Any]:
    """A job that has succeeded, with two outputs."""
    return server.run(body(model, "compressed-tensors", "parquet") | {"labels": {"model": "small"}})


@pytest.fixture(scope="session")
def keyed(tmp_path_factory: pytest.TempPathFactory, model_root: Path) -> Iterator[Keyed]:
    """A server that asks for keys, shared: tests take tenants of their own."""
    running = Keyed(Server(tmp_path_factory.mktemp("keyed") / "data", [model_root], require_keys=True))
    yield running
    running.stop()
