"""Memory of a process as the kernel counts it: anonymous pages sampled over time, and the high-water mark."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 0.002


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest values seen, in bytes.

    `anonymous` is RssAnon, sampled; `high_water` is VmHWM, which the kernel keeps without gaps and
    which counts mapped files (libraries, here) as well.
    """

    anonymous: int
    high_water: int
    samples: int


class Watch:
    """Samples a process until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._peak = Peak(0, 0, 0)
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def peak(self) -> Peak:
        """So far."""
        self._take()
        return self._peak

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; harmless when the process is gone already."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_S) and self._take():
            pass

    def _take(self) -> bool:
        try:
            now = _status(str(self._pid))
        except (FileNotFoundError, ProcessLookupError):
            return False
        if "RssAnon" not in now:  # it has ended, and waits to be reaped
            return False
        seen = self._peak
        self._peak = Peak(max(seen.anonymous, now["RssAnon"]), max(seen.high_water, now["VmHWM"]), seen.samples + 1)
        return True


@contextmanager
def watch(pid: int) -> Iterator[Watch]:
    """Watch a process for as long as the block lasts."""
    watching = Watch(pid)
    watching.start()
    try:
        yield watching
    finally:
        watching.stop()


def anonymous_bytes(pid: int | str) -> int:
    """RssAnon of a process now."""
    return _status(str(pid))["RssAnon"]


def forget_high_water() -> None:
    """Let VmHWM of this process count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(pid: str) -> dict[str, int]:
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) << 10 for words in lines if len(words) == 3 and words[2] == "kB"}
