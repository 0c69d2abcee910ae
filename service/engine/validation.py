"""Compares two stored models by reading both back, and so checks the writer too."""

from __future__ import annotations

import time

from service.engine.backends.base import Backend
from service.engine.clock import Clock
from service.engine.formats.base import ModelReader
from service.engine.meter import Meter
from service.engine.metrics import ErrorSums
from service.engine.progress import Cancelled, Notice, Report
from service.engine.publish import stop_when
from service.engine.report import OutputReport, RunReport, TensorReport
from service.engine.tensor_run import row_blocks
from service.engine.tensors import TensorInfo, non_finite
from service.errors import ModelsDiffer, NonFiniteWeights

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
    clock: Clock | None = None,
) -> RunReport:
    """Measure how far `quantized` is from `original`, tensor by tensor; writes nothing.

    Raises ModelsDiffer when names or shapes do not match, and Cancelled.
    """
    started = time.monotonic()
    clock = clock or Clock()
    pairs = _pairs(original, quantized)
    meter = Meter(report, len(pairs), sum(info.nbytes for info, _ in pairs))
    meter.start("validating")
    reports: list[TensorReport] = []
    warnings: list[str] = []
    for info, other in pairs:
        begun = time.monotonic()
        sums = _compare(original, quantized, info, other, backend, block_bytes, cancelled, meter, clock)
        reports.append(_report(info, other, sums, time.monotonic() - begun))
        meter.tensor_done(info.nbytes)
        report(reports[-1].completed(quantized.format_id))
        if sums is None and not _same_bytes(original, quantized, info, other, block_bytes, cancelled, clock):
            notice = Notice("copy_differs", f"{info.dtype} is not compared as numbers, and its bytes differ", info.name)
            warnings.append(notice.sentence)
            report(notice)
    output = OutputReport(
        name=quantized.format_id,
        format=quantized.format_id,
        bit_width=None,
        min_accuracy=min_accuracy,
        tensors=tuple(reports),
        original_bytes=sum(info.nbytes for info, _ in pairs),
    )
    seconds = time.monotonic() - started
    return RunReport(
        kind="validate",
        modality=original.layout.modality,
        backend=backend.id,
        outputs=(output,),
        warnings=tuple(warnings),
        seconds=seconds,
        stages=clock.times.seconds,
        stage_bytes=clock.times.nbytes,
    )


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
    backend: Backend,
    block_bytes: int,
    cancelled: Cancelled,
    meter: Meter,
    clock: Clock,
) -> ErrorSums | None:
    """The errors of a float tensor, None of any other."""
    if not (info.is_float and other.is_float):
        return None
    sums = ErrorSums()
    for start, stop in row_blocks(info, block_bytes):
        stop_when(cancelled)
        nbytes = info.nbytes * (stop - start) // max(1, info.rows)
        with clock.during("read", nbytes):
            rows = original.rows(info, start, stop), quantized.rows(other, start, stop)
        with clock.during("compare", nbytes):
            sums += backend.compare(*rows)
        meter.within_tensor(info.nbytes * stop // max(1, info.rows))
    if not sums.finite:
        raise NonFiniteWeights(f"tensor {info.name} {non_finite(info)}, in one of the models", tensor=info.name)
    return sums


def _same_bytes(
    original: ModelReader,
    quantized: ModelReader,
    info: TensorInfo,
    other: TensorInfo,
    block_bytes: int,
    cancelled: Cancelled,
    clock: Clock,
) -> bool:
    if info.dtype != other.dtype or other.stored_as is not None:
        return False
    for start in range(0, info.nbytes, block_bytes):
        stop_when(cancelled)
        stop = min(start + block_bytes, info.nbytes)
        with clock.during("read", stop - start):
            raw = original.raw(info, start, stop), quantized.raw(other, start, stop)
        if raw[0] != raw[1]:
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
