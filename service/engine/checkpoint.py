"""The journal of a run: a line for each tensor, or some small ones, from which another process can go on.

It lives beside the files it speaks of. A line is written after its tensors' bytes, and the kernel
keeps both when the process is killed. When the machine itself went down, bytes may be missing
behind a line that survived; the id of the boot tells, and the journal is then not believed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from service.engine.clock import Times
from service.engine.report import TensorReport, tensor_from_row, tensor_to_row

#: Its name in the work folder.
JOURNAL = "checkpoint.jsonl"
_ENCODER = json.JSONEncoder(separators=(",", ":"))
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: Read from the end of a journal at once.
TAIL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Entry:
    """Finished tensors: of each its report in each output, what was told of them, and the writers' states."""

    reports: tuple[tuple[TensorReport, ...], ...]
    warnings: tuple[str, ...]
    states: tuple[dict[str, Any], ...]
    seconds: float  # of the whole run, up to here
    times: Times = field(default_factory=Times)  # likewise

    def to_line(self) -> str:
        """As a line of JSON."""
        fields = {
            "reports": [[tensor_to_row(r) for r in reports] for reports in self.reports],
            "warnings": self.warnings,
            "states": self.states,
            "seconds": self.seconds,
            "times": {"seconds": self.times.seconds, "nbytes": self.times.nbytes},
        }
        return _ENCODER.encode(fields) + "\n"

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        """The inverse of `to_line`; raises LookupError, TypeError or ValueError when it is of nothing such."""
        reports = tuple(tuple(tensor_from_row(r) for r in each) for each in data["reports"])
        times = Times(**data.get("times", {}))
        return cls(reports, tuple(data["warnings"]), tuple(data["states"]), data["seconds"], times)


class Journal:
    """Append-only file of entries under a header that names the run they belong to."""

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._header = json.dumps({"run": run, "boot": _boot_id()}) + "\n"
        self._file: TextIO | None = None

    def resume(self) -> list[Entry]:
        """The entries of an earlier process for the same run and boot, if any; then ready to append.

        From the first damaged line on nothing is believed: the work behind it is done anew.
        """
        entries, size = self._read()
        self._file = self._path.open("a+", encoding="utf-8")
        self._file.truncate(size)  # a line cut off by a crash goes
        if not size:
            self._file.write(self._header)
            self._file.flush()
        return entries

    def append(self, entry: Entry) -> None:
        """Note finished tensors; their bytes must be written already."""
        assert self._file is not None, "resume() comes first"
        self._file.write(entry.to_line())
        self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> tuple[list[Entry], int]:
        lines = self._whole_lines()
        header = next(lines, None)
        if header is None or header != self._header.encode():
            return [], 0
        entries, size = [], len(header)
        for line in lines:
            try:
                entries.append(Entry.from_json(json.loads(line)))
            except (LookupError, TypeError, ValueError):
                break
            size += len(line)
        return entries, size

    def _whole_lines(self) -> Iterator[bytes]:
        if self._path.exists():
            with self._path.open("rb") as file:
                yield from (line for line in file if line.endswith(b"\n"))


def seconds_run(path: Path) -> float:
    """How long a run has been at work up to its last finished tensor, by its journal.

    0.0 when there is none, when the line is damaged, or when it is of another boot: then the work is done anew.
    """
    if not path.exists():
        return 0.0
    with path.open("rb") as file:
        header = _fields(file.readline())
    seconds = _fields(_last_whole_line(path)).get("seconds") if header.get("boot") == _boot_id() else None
    return seconds if isinstance(seconds, float) and math.isfinite(seconds) else 0.0


def _fields(line: bytes) -> dict[str, Any]:
    """The fields of a line of JSON; none when it is damaged."""
    try:
        data = json.loads(line)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _last_whole_line(path: Path) -> bytes:
    with path.open("rb") as file:
        size = end = file.seek(0, os.SEEK_END)
        tail = b""
        # A line that is whole has an end, and one before it.
        while end and tail.count(b"\n") < 2:
            start = max(0, end - TAIL_BYTES)
            file.seek(start)
            tail, end = file.read(size - start), start
    lines = [line for line in tail.splitlines(keepends=True) if line.endswith(b"\n")]
    return lines[-1] if lines else b""


def _boot_id() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else "unknown"
