"""Compares two stored models by reading both back, and so checks the writer too."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import service
from service.engine.backends.base import Backend
from service.engine.backends.output_error import with_output
from service.engine.blocks import row_blocks
from service.engine.calibration.feed import Feed
from service.engine.checkpoint import JOURNAL, Entry, Journal
from service.engine.clock import Clock, Times
from service.engine.formats.base import ModelReader
from service.engine.meter import Meter
from service.engine.metrics import ErrorSums
from service.engine.progress import Cancelled, Notice, Report
from service.engine.publish import stop_when
from service.engine.report import OutputReport, RunReport, TensorReport
from service.engine.tensor_run import Tools
from service.engine.tensors import FloatArray, TensorInfo, non_finite
from service.errors import ModelsDiffer, NonFiniteWeights
from service.storage.faults import storage_faults

NAMES_SHOWN = 5


def validate(
    original: ModelReader,
    quantized: ModelReader,
    *,
    min_accuracy: float,
    backend: Backend,
    block_bytes: int,
    report: Report,
    cancelled: Cancelled,
    work: Path | None = None,
    clock: Clock | None = None,
    feed: Feed | None = None,
) -> RunReport:
    """Measure how far `quantized` is from `original`, tensor by tensor; writes nothing but a journal.

    With the Gram matrices of `feed` the outputs of layers are compared as well, and decide.

    That lies in the folder `work`, if there is one: a run on the same models goes on behind its last tensor.
    Raises ModelsDiffer when names or shapes do not match, and Cancelled.
    """
    pairs = _pairs(original, quantized)
    with storage_faults("writing the checkpoint"):
        tools = Tools(backend, block_bytes, report, cancelled, clock or Clock())
        comparison = _Comparison(original, quantized, pairs, tools, work, feed)
        try:
            return comparison.execute(min_accuracy)
        finally:
            comparison.close()


class _Comparison:
    """The state of one run."""

    def __init__(
        self,
        original: ModelReader,
        quantized: ModelReader,
        pairs: list[tuple[TensorInfo, TensorInfo]],
        tools: Tools,
        work: Path | None,
        feed: Feed | None,
    ) -> None:
        self._original, self._quantized = original, quantized
        self._pairs, self._tools, self._feed = pairs, tools, feed
        run = _fingerprint(original, quantized, tools, feed)
        self._journal = Journal(work / JOURNAL, run) if work is not None else None
        self._meter = Meter(tools.report, len(pairs), sum(info.nbytes for info, _ in pairs))
        self._reports: list[TensorReport] = []
        self._warnings: list[str] = []
        self._seconds_before = 0.0
        self._started = time.monotonic()

    def execute(self, min_accuracy: float) -> RunReport:
        """Every pair, then the report."""
        for info, other in self._pairs[self._resume() :]:
            stop_when(self._tools.cancelled)
            self._measure(info, other)
        output = OutputReport(
            name=self._quantized.format_id,
            format=self._quantized.format_id,
            bit_width=None,
            min_accuracy=min_accuracy,
            tensors=tuple(self._reports),
            original_bytes=sum(info.nbytes for info, _ in self._pairs),
        )
        return RunReport(
            kind="validate",
            modality=self._original.layout.modality,
            backend=self._tools.backend.id,
            outputs=(output,),
            warnings=tuple(self._warnings),
            seconds=self._seconds,
            stages=self._tools.clock.times.seconds,
            stage_bytes=self._tools.clock.times.nbytes,
        )

    def close(self) -> None:
        """Let go of the journal; harmless after `execute`."""
        if self._journal is not None:
            self._journal.close()

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _resume(self) -> int:
        entries = self._journal.resume() if self._journal is not None else []
        for entry in entries:
            self._reports.extend(report for reports in entry.reports for report in reports)
            self._warnings.extend(entry.warnings)
            self._seconds_before = entry.seconds
        self._tools.clock.go_on(entries[-1].times if entries else Times())
        done = len(self._reports)
        self._meter.start("validating", done, sum(info.nbytes for info, _ in self._pairs[:done]))
        return done

    def _measure(self, info: TensorInfo, other: TensorInfo) -> None:
        begun = time.monotonic()
        original, quantized, tools = self._original, self._quantized, self._tools
        gram = self._gram(info) if other.stored_as else None
        sums = _compare(original, quantized, info, other, tools, self._meter, gram)
        measured = _report(info, other, sums, time.monotonic() - begun)
        warnings: list[Notice] = []
        if sums is None and not _same_bytes(original, quantized, info, other, tools):
            text = f"{info.dtype} is not compared as numbers, and its bytes differ"
            warnings.append(Notice("copy_differs", text, info.name))
        told = [notice.sentence for notice in warnings]
        if self._journal is not None:
            self._journal.append(Entry(((measured,),), tuple(told), (), self._seconds, tools.clock.times))
        self._reports.append(measured)
        self._warnings += told
        self._meter.tensors_done(1, info.nbytes)
        tools.report(measured.completed(quantized.format_id))
        for notice in warnings:
            tools.report(notice)

    def _gram(self, info: TensorInfo) -> FloatArray | None:
        """Of the inputs of the layer that a tensor of codes belongs to, if that is known."""
        if self._feed is None:
            return None
        with self._tools.clock.during("read"):
            inputs = self._feed.inputs(info)
        return None if inputs is None else inputs.gram


def _fingerprint(original: ModelReader, quantized: ModelReader, tools: Tools, feed: Feed | None) -> str:
    """Names all that the measured figures depend on."""
    parts: list[Any] = [service.__version__, tools.backend.id, tools.block_bytes, feed.identity if feed else None]
    for reader in (original, quantized):
        parts += [reader.layout.fingerprint, reader.identity()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _pairs(original: ModelReader, quantized: ModelReader) -> list[tuple[TensorInfo, TensorInfo]]:
    others = {info.name: info for info in quantized.tensors}
    names = {info.name for info in original.tensors}
    if missing := sorted(names - others.keys()):
        raise ModelsDiffer(f"the quantized model lacks {_some(missing)} of the original", tensor=missing[0])
    if extra := sorted(others.keys() - names):
        raise ModelsDiffer(f"the quantized model has {_some(extra)}, which the original lacks", tensor=extra[0])
    pairs = [(info, others[info.name]) for info in original.tensors]
    for info, other in pairs:
        if info.shape != other.shape:
            raise ModelsDiffer(
                f"tensor {info.name} is {list(info.shape)} in the original and {list(other.shape)} in the quantized"
                " model",
                tensor=info.name,
            )
    return pairs


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more tensors"


def _compare(
    original: ModelReader,
    quantized: ModelReader,
    info: TensorInfo,
    other: TensorInfo,
    tools: Tools,
    meter: Meter,
    gram: FloatArray | None,
) -> ErrorSums | None:
    """The errors of a float tensor, None of any other."""
    if not (info.is_float and other.is_float):
        return None
    sums = ErrorSums()
    for start, stop in row_blocks(info, tools.block_bytes):
        stop_when(tools.cancelled)
        nbytes = info.nbytes * (stop - start) // max(1, info.rows)
        with tools.clock.during("read", nbytes):
            x, y = original.rows(info, start, stop), quantized.rows(other, start, stop)
        with tools.clock.during("compare", nbytes):
            compared = tools.backend.compare(x, y)
            sums += compared if gram is None or not compared.finite else with_output(compared, x, y, gram)
        del x, y  # not held while the next ones are read
        meter.within_tensor(info.nbytes * stop // max(1, info.rows))
    if not sums.finite:
        raise NonFiniteWeights(f"tensor {info.name} {non_finite(info)}, in one of the models", tensor=info.name)
    return sums


def _same_bytes(
    original: ModelReader, quantized: ModelReader, info: TensorInfo, other: TensorInfo, tools: Tools
) -> bool:
    if info.dtype != other.dtype or other.stored_as is not None:
        return False
    for start in range(0, info.nbytes, tools.block_bytes):
        stop_when(tools.cancelled)
        stop = min(start + tools.block_bytes, info.nbytes)
        with tools.clock.during("read", stop - start):
            is_same = original.raw(info, start, stop) == quantized.raw(other, start, stop)
        if not is_same:
            return False
    return True


def _report(info: TensorInfo, other: TensorInfo, sums: ErrorSums | None, seconds: float) -> TensorReport:
    return TensorReport(
        name=info.name,
        shape=info.shape,
        dtype=info.dtype,
        scheme=other.stored_as or "none",
        rule="as stored",
        original_bytes=info.nbytes,
        stored_bytes=other.nbytes,
        seconds=seconds,
        # Equal floats are copies; floats that differ count like codes do.
        sums=sums if sums and (other.stored_as or sums.sum_dd) else None,
    )
