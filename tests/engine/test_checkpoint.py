"""The journal as others read it: how long a run has been at work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.engine.checkpoint import BOOT_ID, TAIL_BYTES, Entry, Journal, seconds_run

HEADER = json.dumps({"run": "r", "boot": BOOT_ID.read_text().strip()}) + "\n"
DAMAGED = [
    pytest.param(b"\0" * 100 + b'"x": 1}\n', id="zeros"),
    pytest.param(b"\xff\xfe\n", id="no text"),
    pytest.param(b"[1.5]\n", id="a list"),
    pytest.param(b"1.5\n", id="a number"),
    pytest.param(b'{"seconds": "1.5"}\n', id="seconds that are text"),
    pytest.param(b'{"seconds": NaN}\n', id="seconds that are no number"),
    pytest.param(b'{"seconds": ' + b"9" * 5000 + b"}\n", id="seconds without end"),
]


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


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_tells_no_time(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "checkpoint.jsonl"
    path.write_bytes(HEADER.encode() + entry(1.5).encode() + line)
    assert seconds_run(path) == 0.0
    path.write_bytes(line + entry(1.5).encode())
    assert seconds_run(path) == 0.0


def test_the_time_of_another_boot_does_not_count_since_its_work_is_done_anew(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.jsonl"
    path.write_text(json.dumps({"run": "r", "boot": "another"}) + "\n" + entry(1.5))
    assert seconds_run(path) == 0.0


@pytest.mark.parametrize("line", DAMAGED)
def test_a_run_goes_on_before_the_first_damaged_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "checkpoint.jsonl"
    journal = Journal(path, "r")
    assert journal.resume() == []
    entries = [Entry((), (), (), 0.5), Entry((), (), (), 1.5)]
    for each in entries:
        journal.append(each)
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + line + entries[1].to_line().encode())
    again = Journal(path, "r")
    assert again.resume() == entries
    again.close()
    assert path.read_bytes() == whole, "what is damaged goes"


@pytest.mark.parametrize("line", DAMAGED)
def test_a_run_with_a_damaged_header_begins_anew(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "checkpoint.jsonl"
    path.write_bytes(line)
    journal = Journal(path, "r")
    assert journal.resume() == []
    journal.close()
    assert path.read_text() == HEADER
