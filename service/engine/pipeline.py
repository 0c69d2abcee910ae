"""Runs a plan: row block by row block, one read for all outputs, a journal line behind what is written.

What is read next, what is computed and what is written go on at once, each in threads of its own.
Memory is bounded by the block. `cancelled` is asked between blocks; what a stopped or killed run
has written stays in its work folder, and a run with the same plan goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import service
from service.engine.backends.base import Backend
from service.engine.checkpoint import JOURNAL, Journal
from service.engine.clock import Clock, Part, Times
from service.engine.completion import GROUP_BYTES, Completion
from service.engine.config import AUTO
from service.engine.formats.base import ModelReader, ModelWriter, WriterContext
from service.engine.meter import Meter
from service.engine.plan import OutputPlan, Plan
from service.engine.progress import Cancelled, Notice, Report, Stage
from service.engine.publish import Advance, copy_companions, seal, stop_when
from service.engine.read_ahead import ReadAhead
from service.engine.report import OutputReport, RunReport, TensorReport
from service.engine.small_runs import Run, runs
from service.engine.tensor_run import Stations, Tools
from service.engine.write_behind import WriteBehind
from service.storage.durable import remove
from service.storage.faults import storage_faults


def quantize(
    plan: Plan,
    reader: ModelReader,
    work: Path,
    *,
    backend: Backend,
    block_bytes: int,
    report: Report,
    cancelled: Cancelled,
    clock: Clock | None = None,
) -> RunReport:
    """Write every output of the plan to `work/<name>/`: complete, synced, hashed, with a manifest.

    `clock` is told which part of the work goes on.
    Goes on behind the last finished tensor when `work` holds the journal of the same plan. Raises
    Cancelled, or another ArrowQuantError, and then leaves `work` as it is: it can be gone on from,
    or removed.
    """
    with storage_faults("writing the outputs"):
        work.mkdir(parents=True, exist_ok=True)
        run = _Run(plan, reader, work, Tools(backend, block_bytes, report, cancelled, clock or Clock()))
        try:
            return run.execute()
        finally:
            run.close()


class _Run:
    """The state of one run."""

    def __init__(self, plan: Plan, reader: ModelReader, work: Path, tools: Tools) -> None:
        self._plan, self._work, self._tools, self._clock = plan, work, tools, tools.clock
        self._reader = ReadAhead(reader, plan, tools.block_bytes)
        self._journal = Journal(work / JOURNAL, _fingerprint(plan, reader, tools))
        self._meter = Meter(tools.report, len(plan.tensors), plan.source_bytes)
        self._behind = WriteBehind(self._clock)
        self._warnings: list[str] = []
        self._writers: list[ModelWriter] = []
        self._completion = Completion(plan.outputs, self._writers, self._journal, tools.report, self._clock)

    def execute(self) -> RunReport:
        """Tensors, then the files as wholes."""
        with self._clock.during("quantize"):
            return self._execute()

    def _execute(self) -> RunReport:
        done = self._resume()
        if not done:
            for text in self._plan.layout.warnings:
                self._warn(Notice("source", text))
            for notice in self._plan.warnings:
                self._warn(notice)
        rest = self._plan.tensors[done:]
        for index, writer in enumerate(self._writers):
            writer.expect([(tensor.info, tensor.decisions[index].scheme) for tensor in rest])
        for run in runs(rest, self._stations(), self._tools):
            stop_when(self._tools.cancelled)
            self._run(run)
        self._behind.put(self._completion.note)
        self._behind.settle()
        outputs = tuple(self._finish(index, output) for index, output in enumerate(self._plan.outputs))
        return RunReport(
            kind="quantize",
            modality=self._plan.layout.modality,
            backend=self._tools.backend.id,
            outputs=outputs,
            warnings=tuple(self._warnings),
            seconds=self._completion.seconds,
            stages=self._clock.times.seconds,
            stage_bytes=self._clock.times.nbytes,
        )

    def _run(self, run: Run) -> None:
        nbytes = sum(plan.info.nbytes for plan in run.plans)
        if nbytes >= GROUP_BYTES:
            # It may take long: those before it are told now.
            self._behind.put(self._completion.note)
            self._behind.go()
        run.execute()
        self._meter.tensors_done(len(run.plans), nbytes)

    def _stations(self) -> Stations:
        return Stations(
            self._plan.outputs,
            self._reader,
            self._writers,
            self._behind,
            self._completion,
            self._meter,
            self._warn,
            self._plan.feed,
        )

    def close(self) -> None:
        """Let go of the files, when all that is finished is noted; harmless after `execute`."""
        self._reader.close()
        self._behind.close(self._completion.note)
        self._journal.close()
        for writer in self._writers:
            writer.discard()

    def _resume(self) -> int:
        entries = self._journal.resume()
        if not entries:
            for output in self._plan.outputs:  # what lies there is of no run that can be gone on from
                remove(self._work / output.name)
        self._writers += [self._writer(output) for output in self._plan.outputs]
        for index, writer in enumerate(self._writers):
            writer.restore([entry.states[index] for entry in entries])
        for entry in entries:
            self._completion.reports.extend(entry.reports)
            self._warnings.extend(entry.warnings)
            self._completion.seconds_before = entry.seconds
        self._clock.go_on(entries[-1].times if entries else Times())
        done = len(self._completion.reports)
        self._meter.start("quantizing", done, sum(t.info.nbytes for t in self._plan.tensors[:done]))
        return done

    def _writer(self, output: OutputPlan) -> ModelWriter:
        folder = self._work / output.name
        folder.mkdir(parents=True, exist_ok=True)
        context = WriterContext(
            layout=self._plan.layout,
            config=output.config.model_dump(mode="json", exclude_none=True),
            options=output.options,
            service_version=service.__version__,
        )
        return output.format.writer(folder, context)

    def _warn(self, notice: Notice) -> None:
        self._warnings.append(notice.sentence)
        self._behind.put(partial(self._completion.warned, notice))

    def _remark(self, notice: Notice) -> None:
        """A warning about a whole output: behind the journal, so a run that goes on there comes by it again."""
        self._warnings.append(notice.sentence)
        self._tools.report(notice)

    def _finish(self, index: int, output: OutputPlan) -> OutputReport:
        cancelled = self._tools.cancelled
        folder, layout = self._work / output.name, self._plan.layout
        with self._clock.during("write"):
            self._writers[index].close(cancelled)
            stop_when(cancelled)
            for text in self._writers[index].remarks():
                self._remark(Notice("format", text, output=output.name))
            companions = sum(layout.source.size(name) for name in layout.companions)
            copy_companions(layout, folder, self._advancing("writing", companions))
        total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        with self._clock.during("hash"):
            entries = seal(folder, self._about(output), self._advancing("hashing", total), self._writers[index].digest)
        tensors = tuple(reports[index] for reports in self._completion.reports)
        bits = output.config.bit_width
        return OutputReport(
            name=output.name,
            format=output.format.id,
            bit_width=_usual_bits(tensors) if bits in (None, AUTO) else bits,
            min_accuracy=output.config.min_accuracy or 0.0,
            tensors=tensors,
            original_bytes=self._plan.source_bytes + companions,
            files=entries,
            budget=self._plan.budgets[index] if self._plan.budgets else None,
        )

    def _advancing(self, stage: Stage, total: int) -> Advance:
        advance = self._meter.finishing(stage, total)
        part: Part = "write" if stage == "writing" else "hash"

        def checked(nbytes: int) -> None:
            stop_when(self._tools.cancelled)
            self._clock.count(part, nbytes)
            advance(nbytes)

        return checked

    def _about(self, output: OutputPlan) -> dict[str, Any]:
        return {
            "format": output.format.id,
            "service_version": service.__version__,
            "source_fingerprint": self._plan.layout.fingerprint,
            "modality": self._plan.layout.modality,
            "config": output.config.model_dump(mode="json", exclude_none=True),
        }


def _usual_bits(tensors: Iterable[TensorReport]) -> int | None:
    """The width that most tensors have."""
    widths = Counter(t.bits for t in tensors if t.bits is not None)
    return widths.most_common(1)[0][0] if widths else None


def _fingerprint(plan: Plan, reader: ModelReader, tools: Tools) -> str:
    """Names all that the bytes of the outputs depend on; of the source's files also that they are the same ones."""
    parts: list[Any] = [service.__version__, plan.layout.fingerprint, tools.backend.id, tools.block_bytes]
    parts += reader.identity()
    parts.append(plan.feed.identity if plan.feed is not None else None)
    for output in plan.outputs:
        parts += [output.name, output.format.id, output.options.model_dump(mode="json")]
        parts.append(output.config.model_dump(mode="json"))
    if plan.budgets:
        # What was chosen follows from what was measured, too.
        parts.append([[d.scheme.id if d.scheme else None for d in tensor.decisions] for tensor in plan.tensors])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
