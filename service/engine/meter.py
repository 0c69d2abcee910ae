"""How far a run has come, as one number that only grows."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.engine.progress import Progress, Report, Stage

#: Share of the fraction that the tensors take; writing and hashing take the rest.
TENSOR_SHARE = 0.9
RATE_WINDOW_S = 10.0


class Meter:
    """Counts bytes and tensors and reports Progress; one thread."""

    def __init__(self, report: Report, tensors_total: int, bytes_total: int) -> None:
        self._report = report
        self._tensors_total = tensors_total
        self._bytes_total = bytes_total
        self._tensors_done = 0
        self._bytes_done = 0
        self._stage: Stage = "planning"
        self._finishing = 0.0  # share of the work behind the tensors
        self._last_fraction = 0.0
        self._furthest = 0
        self._marks: list[tuple[float, int]] = [(time.monotonic(), 0)]

    def start(self, stage: Stage, tensors_done: int = 0, bytes_done: int = 0) -> None:
        """Begin, possibly behind tensors that an earlier process finished."""
        self._stage, self._tensors_done, self._bytes_done = stage, tensors_done, bytes_done
        self._marks = [(time.monotonic(), bytes_done)]
        self._tell()

    def within_tensor(self, done: int) -> None:
        """`done` bytes of the current tensor are through; doing it again does not take them back."""
        self._tell(done)

    def tensors_done(self, count: int, nbytes: int) -> None:
        """The current tensor is finished, or as many small ones together."""
        self._tensors_done += count
        self._bytes_done += nbytes
        self._tell()

    def finishing(self, stage: Stage, total: int) -> Callable[[int], None]:
        """Begin a stage behind the tensors of `total` bytes; call what is returned with bytes done."""
        self._stage = stage
        begun, end = self._finishing, (self._finishing + 1.0) / 2
        seen = 0

        def advance(nbytes: int) -> None:
            nonlocal seen
            seen += nbytes
            self._finishing = begun + (end - begun) * min(1.0, seen / max(1, total))
            self._tell()

        self._tell()
        return advance

    def _tell(self, ahead: int = 0) -> None:
        done = self._furthest = max(self._furthest, self._bytes_done + ahead)
        share = done / self._bytes_total if self._bytes_total else 1.0
        fraction = TENSOR_SHARE * share + (1.0 - TENSOR_SHARE) * self._finishing
        self._last_fraction = max(self._last_fraction, min(max(fraction, 1e-4), 0.9999))
        rate = self._rate(done)
        left = (self._bytes_total - done) / rate if rate > 0 and self._stage in ("quantizing", "validating") else None
        self._report(
            Progress(
                fraction=self._last_fraction,
                stage=self._stage,
                tensors_done=self._tensors_done,
                tensors_total=self._tensors_total,
                bytes_done=done,
                bytes_total=self._bytes_total,
                bytes_per_s=rate,
                eta_s=left,
            )
        )

    def _rate(self, done: int) -> float:
        """Bytes per second over the last seconds."""
        now = time.monotonic()
        if now - self._marks[-1][0] >= 0.1:
            self._marks.append((now, done))
            while len(self._marks) > 2 and now - self._marks[0][0] > RATE_WINDOW_S:
                self._marks.pop(0)
        then, before = self._marks[0]
        return max(0, done - before) / (now - then) if now > then else 0.0
