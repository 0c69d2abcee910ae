"""A short run of what `bench/kill.py` does at length: SIGKILL at random moments of real work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SEED


def test_a_server_killed_at_random_moments_loses_doubles_and_breaks_nothing(tmp_path: Path) -> None:
    kill = pytest.importorskip("bench.kill", reason="install the demo's model")
    print(f"TEST_SEED={SEED}")
    kills = 5
    seen, promises = kill.run(tmp_path, kills, SEED, clients=3)
    assert seen.aims.total() == kills
    assert seen.results == sum(len(results) for results in promises.results.values()) > 0
