"""The engine as a benchmark calls it: in this process from file to file, or in a child whose memory is watched."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.common import cores
from bench.resident import Peak, anonymous_bytes, forget_high_water, watch
from service.engine.backends.base import Backend
from service.engine.backends.registry import backends, choose_backend
from service.engine.config import Profile, QuantizationConfig, resolve
from service.engine.formats.registry import open_model
from service.engine.pipeline import quantize
from service.engine.plan import OutputSpec, make_plan
from service.engine.report import RunReport
from service.engine.validation import validate
from service.jobs.memory import set_aside

#: What the service has when nothing else is set.
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """A run to be done, as plain data that goes to another process."""

    source: Path
    work: Path
    formats: tuple[str, ...]
    bits: int = 4
    method: str = "minmax"
    block_bytes: int = BLOCK_BYTES
    threads: int = field(default_factory=cores)
    config: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"

    def outputs(self) -> list[OutputSpec]:
        """One for each format, configured alike. Nothing is taken twice: a fallback would be measured with it."""
        wanted = {"bit_width": self.bits, "method": self.method, "symmetric": False, "min_accuracy": 0.0} | self.config
        resolved = resolve(Profile.LOCAL, [QuantizationConfig(**wanted)])
        return [OutputSpec(name, name, resolved) for name in self.formats]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A validation to be done."""

    original: Path
    quantized: Path
    block_bytes: int = BLOCK_BYTES
    threads: int = field(default_factory=cores)
    backend: str = "auto"


def make_backend(threads: int, id_: str = "auto") -> Backend:
    """What the service would choose here, compiled and ready, in a process that is set up like the service's."""
    backend = backends()[choose_backend(id_)](threads=threads)
    backend.warm_up()
    set_aside()
    return backend


def run(job: Job, backend: Backend) -> RunReport:
    """Quantize into `job.work`, which is removed first."""
    shutil.rmtree(job.work, ignore_errors=True)
    with closing(open_model(job.source)) as reader:
        return quantize(
            make_plan(reader, job.outputs()),
            reader,
            job.work,
            backend=backend,
            block_bytes=job.block_bytes,
            report=lambda _: None,
            cancelled=lambda: False,
        )


def compare(comparison: Comparison, backend: Backend) -> RunReport:
    """Measure one model against another."""
    with closing(open_model(comparison.original)) as original, closing(open_model(comparison.quantized)) as quantized:
        return validate(
            original,
            quantized,
            min_accuracy=0.0,
            backend=backend,
            block_bytes=comparison.block_bytes,
            report=lambda _: None,
            cancelled=lambda: False,
        )


@dataclass(frozen=True, slots=True)
class Watched:
    """A run in a process of its own."""

    seconds: float
    baseline_bytes: int  # RssAnon when all is loaded and compiled, before the model is opened
    peak: Peak


def run_watched(job: Job | Comparison) -> Watched:
    """Do the job in a fresh process and watch that process's memory; raises RuntimeError when it fails."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_child, args=(job, theirs))
    child.start()
    theirs.close()
    try:
        assert child.pid is not None
        baseline = int(_receive(ours, child))
        with watch(child.pid) as watched:
            ours.send("go")
            seconds = float(_receive(ours, child))
            peak = watched.peak()
        ours.send("end")
        return Watched(seconds, baseline, peak)
    finally:
        ours.close()
        child.join(10)
        if child.is_alive():
            child.kill()
            child.join()


def tidy(folders: Sequence[Path]) -> None:
    """Remove outputs."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _in_child(job: Job | Comparison, pipe: Connection) -> None:
    backend = make_backend(job.threads, job.backend)
    forget_high_water()
    pipe.send(anonymous_bytes(os.getpid()))
    pipe.recv()
    begun = time.perf_counter()
    if isinstance(job, Comparison):
        compare(job, backend)
    else:
        run(job, backend)
    pipe.send(time.perf_counter() - begun)
    pipe.recv()


def _receive(pipe: Connection, child: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the watched process ended with status {child.exitcode}") from None
