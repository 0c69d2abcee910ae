"""How much memory this machine, or the container around this process, lets it have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUP = Path("/sys/fs/cgroup")
#: Of what there is, for jobs; the rest is for the page cache and for what no prediction knows.
JOBS_SHARE = 0.8
#: What the service itself takes when no job runs: interpreter, libraries, compiled kernels.
SERVICE_BYTES = 256 << 20


def default_limit_bytes() -> int:
    """What all running jobs may take together when nobody says so; at least a quarter of all there is."""
    there_is = available_bytes()
    return max(int(JOBS_SHARE * there_is) - SERVICE_BYTES, there_is // 4)


def available_bytes(root: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Physical memory, or the limit of a control group (version 1 or 2) around this process when that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_group_limits(root, membership)])


def _group_limits(root: Path, membership: Path) -> Iterator[int]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            yield from _limits_above(root, name, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_above(root / "memory", name, "memory.limit_in_bytes")


def _limits_above(root: Path, name: str, file: str) -> Iterator[int]:
    """A group's limit and those of all around it; in a container the outer ones are out of sight."""
    group = PurePosixPath(name)
    for folder in (group, *group.parents):
        try:
            text = (root / folder.relative_to("/") / file).read_text().strip()
        except (OSError, ValueError):
            continue
        if text.isdigit():
            yield int(text)
