"""How much memory there is: physical, or what control groups of either version leave of it; and what lanes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.engine.backends.registry import backends
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
    others = {backend.device for backend in backends().values()} - {"cpu"}
    assert lanes_of(3, {}) == {"cpu": 3} | dict.fromkeys(others, 1)
    assert lanes_of(3, dict.fromkeys(others, 2)) == {"cpu": 3} | dict.fromkeys(others, 2)


@pytest.mark.parametrize(("device", "hint"), [("tpu", "no backend computes"), ("cpu", "max_running_jobs")])
def test_a_server_with_lanes_for_a_device_that_has_none_does_not_start(tmp_path: Path, device: str, hint: str) -> None:
    variables = os.environ | {"ARROWQUANT_DEVICE_LANES": json.dumps({device: 2})}
    command = [sys.executable, "-m", "service", "serve", "--port", "0", "--data-dir", str(tmp_path / "data")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "device_lanes" in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
