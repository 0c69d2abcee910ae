"""A disk that fills up under a job: the job fails by that name, makes room, and the service works on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.models import make_long_model, make_model, quantize_request

REPOSITORY = Path(__file__).parents[2]
SMALL_DISK = 'mount -t tmpfs -o size=3m none "$0" && exec "$@"'


def may_mount() -> bool:
    """Whether an unprivileged mount namespace, or a privileged one, can be had here."""
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="needs a mount namespace to make a small disk in")
def test_a_full_disk_fails_the_job_that_filled_it_and_the_next_job_has_its_room_again(tmp_path: Path) -> None:
    root, data = tmp_path / "models", tmp_path / "data"
    data.mkdir()
    too_large = quantize_request(make_long_model(root / "long.safetensors"), config={"skip": ["*"]})
    fits = quantize_request(make_model(root / "m.safetensors"))
    body = json.dumps([request.model_dump(mode="json", exclude_unset=True) for request in (too_large, fits)])
    program = [sys.executable, "-m", "tests.jobs.child", str(data), str(root), body]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, str(data), *program]
    lines = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "job.failed" in lines
    assert lines[-4:-2] == ["ended failed disk_full", "ended succeeded "]
    assert lines[-2] == "work"
    (_, only) = lines[-1].split()
    assert only != lines[0], "the artifacts are those of the second job"
