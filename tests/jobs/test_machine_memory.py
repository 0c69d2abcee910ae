"""How much memory there is: physical, or what control groups of either version leave of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.jobs.backend_pool import lanes_of
from service.jobs.machine_memory import available_bytes, default_limit_bytes

GIB = 1 << 30
PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
#: What version 1 says when there is no limit.
NO_LIMIT_V1 = "9223372036854771712"


def seen(tmp_path: Path, membership: str, files: dict[str, str]) -> int:
    """What is available where these files are the control groups."""
    (tmp_path / "self").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return available_bytes(tmp_path / "cgroup", tmp_path / "self")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        pytest.param("0::/\n", {"memory.max": f"{GIB // 4}"}, GIB // 4, id="version 2, in a container"),
        pytest.param("0::/a/b\n", {"a/memory.max": "1000000", "a/b/memory.max": "max"}, 1000000, id="an outer group"),
        pytest.param("0::/a/b\n", {"a/memory.max": "3000", "a/b/memory.max": "2000"}, 2000, id="the least of all"),
        pytest.param("0::/a\n", {"a/memory.max": "max"}, PHYSICAL, id="no limit"),
        pytest.param(
            "5:cpu:/x\n4:memory:/docker/c\n",
            {"memory/memory.limit_in_bytes": "5000"},
            5000,
            id="version 1, from within",
        ),
        pytest.param("4:memory:/\n", {"memory/memory.limit_in_bytes": NO_LIMIT_V1}, PHYSICAL, id="version 1, no limit"),
        pytest.param("0::/../outside\n", {"memory.max": "7000"}, 7000, id="a group out of sight"),
    ],
)
def test_the_least_limit_around_the_process_counts(
    tmp_path: Path, membership: str, files: dict[str, str], expected: int
) -> None:
    assert seen(tmp_path, membership, files) == expected


def test_without_control_groups_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "none", tmp_path / "none") == PHYSICAL


def test_jobs_may_have_most_of_it_and_never_all() -> None:
    assert available_bytes() // 4 <= default_limit_bytes() <= available_bytes() * 4 // 5


def test_every_device_has_lanes_and_settings_win() -> None:
    assert lanes_of(3, {}) == {"cpu": 3}
    assert lanes_of(3, {"cuda": 2}) == {"cpu": 3, "cuda": 2}
