"""Managers on fresh data folders, drained after each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from service.engine.config import QuantizationConfig
from service.jobs.manager import JobManager

MakeManager = Callable[..., Awaitable[JobManager]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder that requests may name."""
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
async def make_manager(tmp_path: Path, root: Path) -> AsyncIterator[MakeManager]:
    """Starts managers on `tmp_path/data`; the reference backend needs no compiling."""
    made: list[JobManager] = []

    async def make(**settings: Any) -> JobManager:
        given = {
            "data_dir": tmp_path / "data",
            "model_roots": [root],
            "config_defaults": QuantizationConfig(backend="reference", method="minmax"),
            "block_bytes": 1 << 18,
        }
        manager = JobManager(**(given | settings))
        await manager.start()
        made.append(manager)
        return manager

    yield make
    for manager in made:
        await manager.drain(10)


@pytest.fixture
async def manager(make_manager: MakeManager) -> JobManager:
    """One started manager."""
    return await make_manager()
