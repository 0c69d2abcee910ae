"""Whatever strangers send is read or refused, by every reader: a short run of what bench/fuzz.py does at length."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from bench.fuzzing.mutate import mutate
from bench.fuzzing.targets import TARGETS, Target
from tests.conftest import SEED

INPUTS = 200


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_spoilt_inputs_are_read_or_refused(target: Target, tmp_path: Path) -> None:
    print(f"TEST_SEED={SEED}")
    run, pool = target.start(tmp_path), target.seeds()
    outcomes = {run(data) for data in pool}

    @seed(SEED)
    @settings(max_examples=INPUTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.sampled_from(pool), number=st.integers(0, 1 << 62))
    def spoil(data: bytes, number: int) -> None:
        outcomes.add(run(mutate(random.Random(number), data, pool, target.tokens)))

    spoil()
    assert len(outcomes) > 1, f"whatever was done to them, all inputs came to {outcomes}"
