"""Seconds of what `bench/soak.py` does for an hour: mixed traffic, of which nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SEED

MIB = 1 << 20


def test_under_mixed_traffic_every_answer_is_right_and_nothing_piles_up(tmp_path: Path) -> None:
    bench = pytest.importorskip("bench.soak", reason="install the demo's model")
    print(f"TEST_SEED={SEED}")
    samples, traffic = bench.soak(tmp_path, 12.0, SEED, customers=4)
    print(samples[-1], traffic.done)
    assert traffic.done.total() >= 11, "each kind of work was done"
    assert max(sample.files for sample in samples) < 100
    assert max(sample.threads for sample in samples) < 60
    assert max(sample.database_bytes for sample in samples) < 32 * MIB
