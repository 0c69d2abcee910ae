"""Quantizing and validating in this process, without a server."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from service.cli.display import open_display
from service.cli.target import new_folder, refuse_inside, write_report
from service.engine.backends.base import Backend
from service.engine.backends.registry import backends, choose_backend
from service.engine.budget import within_budgets
from service.engine.calibration.calibration import Calibration
from service.engine.calibration.opening import open_calibration
from service.engine.checkpoint import JOURNAL
from service.engine.config import QuantizationConfig, ResolvedConfig, resolve
from service.engine.formats.base import ModelReader
from service.engine.formats.registry import open_model
from service.engine.pipeline import quantize
from service.engine.plan import check_outputs, make_feed, make_plan
from service.engine.report import RunReport
from service.engine.report_page import report_page
from service.engine.sensitivity import behind_measuring
from service.engine.validation import validate
from service.errors import InvalidConfig, ModelNotFound
from service.jobs.admission import output_specs
from service.jobs.request import QuantizeRequest, ValidateRequest


@dataclass(frozen=True, slots=True)
class Means:
    """What a run in this process may use, and the environment's share of the configuration."""

    threads: int
    device_memory_bytes: int
    block_bytes: int
    defaults: QuantizationConfig | None

    def backend(self, config: ResolvedConfig) -> Backend:
        """The backend that the configuration names."""
        return backends()[choose_backend(config.backend or "auto")](self.threads, self.device_memory_bytes)


def warm_up() -> Iterator[tuple[str, float]]:
    """Make every backend that can run here compile its kernels; gives each one's name and the seconds it took."""
    for name, backend in backends().items():
        if backend.unavailable() is None:
            begun = time.monotonic()
            backend().warm_up()
            yield name, time.monotonic() - begun


def quantize_here(
    body: dict[str, Any], source: Path, out: Path, means: Means, calibration: Path | None = None
) -> dict[str, Any]:
    """Carry out the body of a `POST /v1/jobs` on a model on this disk, into `out`; answers like a job.

    `out` appears whole or not at all: a folder for each output, and `report.json`.
    Raises any ArrowQuantError; Cancelled when Ctrl-C was pressed.
    """
    with _as_invalid_config():
        request = QuantizeRequest.model_validate(body | {"source": _source(source)})
    config = resolve(request.profile, [means.defaults, request.config])
    specs = output_specs(request, config)
    check_outputs(specs, is_calibrated=calibration is not None)
    refuse_inside(out, source)
    with (
        new_folder(out) as folder,
        open_display() as display,
        interruptible() as cancelled,
        closing(_open(source)) as reader,
        _opened_calibration(calibration) as fed,
    ):
        backend = means.backend(config)
        plan = make_plan(reader, specs, fed)
        plan = within_budgets(plan, reader, backend=backend, memo=None, report=display, cancelled=cancelled)
        report = quantize(
            plan,
            reader,
            folder,
            backend=backend,
            block_bytes=means.block_bytes,
            report=behind_measuring(display) if plan.budgets else display,
            cancelled=cancelled,
        )
        (folder / JOURNAL).unlink(missing_ok=True)
        write_report(folder, report.to_json(), report_page(report))
    return _job(report)


def validate_here(
    body: dict[str, Any], original: Path, quantized: Path, means: Means, calibration: Path | None = None
) -> dict[str, Any]:
    """Carry out the body of a validation on two models on this disk; answers like a job."""
    with _as_invalid_config():
        sources = {"original": _source(original), "quantized": _source(quantized)}
        request = ValidateRequest.model_validate(body | sources)
    config = resolve(request.profile, [means.defaults, request.config])
    with (
        open_display() as display,
        interruptible() as cancelled,
        closing(_open(original)) as before,
        closing(_open(quantized)) as after,
        _opened_calibration(calibration) as fed,
    ):
        report = validate(
            before,
            after,
            min_accuracy=config.min_accuracy or 0.0,
            backend=means.backend(config),
            block_bytes=means.block_bytes,
            report=display,
            cancelled=cancelled,
            feed=make_feed([config], fed) if fed is not None else None,
        )
    return _job(report)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C or SIGTERM a flag, to be asked for; the second one interrupts as usual."""
    asked = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell makes what it runs in the background ignore Ctrl-C; so it stays.
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        asked.set()
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield asked.is_set
    finally:
        restore()


def _job(report: RunReport) -> dict[str, Any]:
    return {"kind": report.kind, "status": "succeeded", "result": report.result()}


def _open(path: Path) -> ModelReader:
    # The engine does not name paths: a server must not tell which ones there are.
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist")
    return open_model(path)


@contextmanager
def _opened_calibration(path: Path | None) -> Iterator[Calibration | None]:
    if path is None:
        yield None
        return
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist")
    with closing(open_calibration(path)) as calibration:
        yield calibration


def _source(path: Path) -> dict[str, str]:
    return {"type": "uri", "uri": path.as_uri()}


@contextmanager
def _as_invalid_config() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        problems = [(_pointer(e["loc"]), e["msg"]) for e in error.errors()]
        detail = "; ".join(f"{where}: {what}" for where, what in problems)
        raise InvalidConfig(detail, pointer=problems[0][0]) from error


def _pointer(location: Sequence[int | str]) -> str:
    return "/" + "/".join(str(part) for part in location)
