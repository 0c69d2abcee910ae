"""A disk that is full somewhere in a job: a short run of what `bench/disk_full.py` does at every page."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.disk_full import Met, placed, step_through
from bench.small_disk import may_mount

KIB = 1 << 10
#: KiB of room for what is done: from too little to more than it takes.
ROOMS = {
    "quantize into both formats": (0, 40, 120, 320, 2048),
    "publish to another disk": (0, 40, 2048),
    "upload a blob": (8, 200, 2048),
}


@pytest.mark.skipif(not may_mount(), reason="needs a mount namespace to make small disks in")
@pytest.mark.parametrize("name", ROOMS)
def test_a_full_disk_is_said_harms_nobody_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    with placed(tmp_path) as place:
        mets = step_through(place, name, (room * KIB for room in ROOMS[name]), enough=1)
    print(mets)
    assert mets[0].outcome != "succeeded", "there was no room at all"
    assert mets[-1] == Met(mets[-1].room_bytes, "succeeded", "")
    assert all(met.detail for met in mets if met.outcome != "succeeded")
