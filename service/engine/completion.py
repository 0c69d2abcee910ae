"""What is done when tensors are finished: a line in the journal for some of them together, then they are told."""

from __future__ import annotations

import time
from collections.abc import Sequence

from service.engine.checkpoint import Entry, Journal
from service.engine.clock import Clock
from service.engine.formats.base import ModelWriter
from service.engine.plan import OutputPlan
from service.engine.progress import Notice, Report
from service.engine.report import TensorReport

#: Tensors share a line, which is written when they have so many bytes of the source, or took so long, together: work
#: that is done again after a crash.
GROUP_BYTES = 1 << 20
GROUP_S = 0.05


class Completion:
    """Takes finished tensors in their order; in the thread that writes."""

    def __init__(
        self,
        outputs: Sequence[OutputPlan],
        writers: Sequence[ModelWriter],
        journal: Journal,
        report: Report,
        clock: Clock,
    ) -> None:
        self._outputs, self._writers, self._journal = outputs, writers, journal
        self._report, self._clock = report, clock
        self._started = time.monotonic()
        #: What the run took in earlier processes.
        self.seconds_before = 0.0
        #: Of every tensor that is in the journal, a report for each output.
        self.reports: list[tuple[TensorReport, ...]] = []
        self._group: list[tuple[TensorReport, ...]] = []
        self._group_bytes = 0
        self._told: list[str] = []
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """What the run took up to now."""
        return self.seconds_before + time.monotonic() - self._started

    def warned(self, notice: Notice) -> None:
        """Tell something, and note it with the next tensor for a run that goes on."""
        self._report(notice)
        self._told.append(notice.sentence)

    def finished(self, *tensors: tuple[TensorReport, ...]) -> None:
        """Tensors are whole in every output: of each the reports."""
        self._group += tensors
        self._group_bytes += sum([reports[0].original_bytes for reports in tensors])
        if self._group_bytes >= GROUP_BYTES or time.monotonic() - self._begun >= GROUP_S:
            self.note()

    def note(self) -> None:
        """Write down all that was finished, and tell it."""
        group, told = self._group, self._told
        if group:
            states = tuple(writer.state() for writer in self._writers)
            self._journal.append(Entry(tuple(group), tuple(told), states, self.seconds, self._clock.times))
            self.reports += group
            self._group, self._told, self._group_bytes = [], [], 0
            for reports in group:
                for output, report in zip(self._outputs, reports, strict=True):
                    self._report(report.completed(output.name))
        self._begun = time.monotonic()
