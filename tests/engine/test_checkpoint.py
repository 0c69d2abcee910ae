"""The journal as others read it: how long a run has been at work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.engine.checkpoint import TAIL_BYTES, seconds_run

HEADER = json.dumps({"run": "r", "boot": "b"}) + "\n"


def entry(seconds: float, size: int = 10) -> str:
    return json.dumps({"warnings": "x" * size, "seconds": seconds}) + "\n"


@pytest.mark.parametrize(
    ("content", "seconds"),
    [
        pytest.param("", 0.0, id="nothing"),
        pytest.param(HEADER, 0.0, id="no tensor"),
        pytest.param(HEADER + entry(1.5), 1.5, id="one"),
        pytest.param(HEADER + entry(1.5) + entry(2.5), 2.5, id="two"),
        pytest.param(HEADER + entry(1.5) + entry(2.5)[:-5], 1.5, id="cut off"),
        pytest.param(HEADER + entry(1.5) + entry(2.5, 3 * TAIL_BYTES), 2.5, id="longer than is read at once"),
        pytest.param(HEADER + entry(1.5, TAIL_BYTES) + entry(2.5, TAIL_BYTES)[:-5], 1.5, id="long and cut off"),
    ],
)
def test_the_time_that_a_run_has_taken_is_that_of_its_last_whole_line(
    tmp_path: Path, content: str, seconds: float
) -> None:
    path = tmp_path / "checkpoint.jsonl"
    path.write_text(content)
    assert seconds_run(path) == seconds


def test_a_run_that_never_began_has_taken_no_time(tmp_path: Path) -> None:
    assert seconds_run(tmp_path / "checkpoint.jsonl") == 0.0
