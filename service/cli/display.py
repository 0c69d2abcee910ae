"""Progress on stderr: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from service.cli.outcome import mute
from service.engine.progress import Happening, Notice, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

#: A pipe gets at most so many lines of progress, beside one for each stage.
STEPS = 20


@dataclass(frozen=True, slots=True)
class Transfer:
    """How far files have been hashed or sent."""

    fraction: float
    stage: str
    files_done: int
    files_total: int
    bytes_per_s: float


class Display(Protocol):
    """Takes what a run reports, from any thread."""

    def __call__(self, happening: Happening | Transfer) -> None:
        """Show it, or not."""


@contextmanager
def open_display() -> Iterator[Display]:
    """The display that suits stderr."""
    if not sys.stderr.isatty():
        yield LineDisplay()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description:<11}"), BarColumn(None), TaskProgressColumn())
    more = (TextColumn("{task.fields[tensors]}"), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with RichProgress(*columns, *more, console=Console(stderr=True)) as bars:
        yield BarDisplay(bars, bars.add_task("starting", total=1.0, tensors="", rate=""))


class LineDisplay:
    """A line for every few percent, stage and warning; no control characters."""

    def __init__(self) -> None:
        self._step = -1
        self._stage = ""

    def __call__(self, happening: Happening | Transfer) -> None:
        """Print a line if there is something new to say."""
        match happening:
            case Progress(fraction=fraction, stage=stage) | Transfer(fraction=fraction, stage=stage):
                step = int(fraction * STEPS)
                if step > self._step or stage != self._stage:
                    self._step, self._stage = step, stage
                    self._say(_line(happening))
            case Notice():
                self._say(f"warning: {happening.sentence}")

    def _say(self, text: str) -> None:
        try:
            print(text, file=sys.stderr, flush=True)
        except BrokenPipeError:
            # Nobody watches any more, which is no reason to stop.
            mute(sys.stderr)


class BarDisplay:
    """One bar, and the warnings above it."""

    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def __call__(self, happening: Happening | Transfer) -> None:
        """Move the bar."""
        match happening:
            case Progress() | Transfer():
                self._bars.update(
                    self._task,
                    description=happening.stage,
                    completed=happening.fraction,
                    tensors=_count(happening),
                    rate=_rate(happening),
                )
            case Notice():
                self._bars.console.print(f"warning: {happening.sentence}", markup=False, highlight=False)


def _line(progress: Progress | Transfer) -> str:
    parts = [f"{progress.fraction:4.0%} {progress.stage}", _count(progress), _rate(progress)]
    return ", ".join(part for part in parts if part)


def _count(progress: Progress | Transfer) -> str:
    if isinstance(progress, Transfer):
        return f"{progress.files_done} of {progress.files_total} files"
    return f"{progress.tensors_done} of {progress.tensors_total} tensors" if progress.tensors_total else ""


def _rate(progress: Progress | Transfer) -> str:
    return f"{progress.bytes_per_s / 2**20:.0f} MiB/s" if progress.bytes_per_s else ""
