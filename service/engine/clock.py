"""Where the time of a run goes: each moment of its thread belongs to one part, so that the parts add up."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Literal, TypeVar

#: `plan` opens the sources and reads their headers. `read` waits for weights: what is read ahead while the run
#: computes costs it nothing, and does not count. `quantize` and `compare` compute. `write` waits for what is laid out
#: and stored, and completes files, likewise. `hash` hashes what is not yet and waits for the disk, `publish` puts
#: everything in its place, or away, `wait` gives way to other jobs.
Part = Literal["plan", "read", "quantize", "compare", "write", "hash", "publish", "wait"]

N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds and bytes by part. Bytes are those of the source that were read, quantized or compared, and of outputs
    that were written and hashed."""

    seconds: dict[str, float] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Times) -> Times:
        return Times(_sums(self.seconds, other.seconds), _sums(self.nbytes, other.nbytes))


class Clock:
    """Counts the seconds of one thread at a time; any other may look. Stands still until the first part."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._nbytes: dict[str, int] = {}
        self._part: Part | None = None
        self._since = 0.0
        self._earlier: Times | None = None
        #: What computes, once that is known.
        self.backend = "none"

    def turn(self, part: Part | None) -> Part | None:
        """From now on the time is this part's, or nobody's; returns whose it was."""
        with self._lock:
            now = time.perf_counter()
            before, self._part = self._part, part
            if before is not None:
                self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
            self._since = now
            return before

    def during(self, part: Part, nbytes: int = 0) -> Span:
        """For `with`: the time in it is this part's, in which so many bytes are worked on."""
        return Span(self, part, nbytes)

    def count(self, part: Part, nbytes: int) -> None:
        """So many bytes more went through a part."""
        self._nbytes[part] = self._nbytes.get(part, 0) + nbytes

    def go_on(self, earlier: Times) -> None:
        """Begin behind what an earlier process noted; only the first call counts, for a run that is interrupted and
        goes on with the same clock has noted its own time."""
        if self._earlier is None:
            self._earlier = earlier

    @property
    def here(self) -> Times:
        """What this process spent so far."""
        with self._lock:
            seconds = dict(self._seconds)
            if self._part is not None:
                seconds[self._part] = seconds.get(self._part, 0.0) + time.perf_counter() - self._since
            return Times(seconds, dict(self._nbytes))

    @property
    def times(self) -> Times:
        """What the run took so far, in earlier processes as well."""
        here = self.here
        return self._earlier + here if self._earlier is not None else here


class Span:
    """A part of the time, for `with`; the part around it goes on afterwards."""

    __slots__ = ("_before", "_clock", "_nbytes", "_part")

    def __init__(self, clock: Clock, part: Part, nbytes: int) -> None:
        self._clock, self._part, self._nbytes = clock, part, nbytes

    def __enter__(self) -> None:
        self._before = self._clock.turn(self._part)

    def __exit__(self, *_: object) -> None:
        self._clock.turn(self._before)
        if self._nbytes:
            self._clock.count(self._part, self._nbytes)


def _sums(one: dict[str, N], other: dict[str, N]) -> dict[str, N]:
    total = dict(one)
    for name, more in other.items():
        total[name] = total[name] + more if name in total else more
    return total
