"""From file to file, in this process, beside `cp` of the same source in the same run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import GB, Samples, measure, note, seconds, table, write_result
from bench.engine import BLOCK_BYTES, Job, make_backend, run, tidy
from bench.models import Model, Shapes, equal, layered, scratch, warm, write_model
from service.engine import pipeline
from service.engine.backends.base import Backend
from service.engine.read_ahead import ReadAhead

MODEL_BYTES = 1_000_000_000
REPEATS = 3
DTYPES = ("F32", "BF16")
METHODS = ("minmax", "mse")
BOTH = ("compressed-tensors", "parquet")
OUTPUTS = (("compressed-tensors",), ("parquet",), BOTH)
#: Many small tensors and the same bytes in large ones: (what, count, shape) of F32.
SMALL = (
    ("5,000 tensors of 4 KB, too small to be quantized: copied", 5000, (8, 128)),
    ("the same bytes in 1 tensor, quantized", 1, (40_000, 128)),
    ("5,000 tensors of 32 KB, quantized", 5000, (64, 128)),
    ("the same bytes in 4 tensors, quantized", 4, (80_000, 128)),
)

ABOUT = f"""
The engine in this process quantizes a safetensors file to 4 bits in groups of 128, with zero points, blocks of
{BLOCK_BYTES >> 20} MiB and all cores. Source and outputs lie on the same disk; the source is in the page cache.
GB/s is bytes of source by the median time, and *spread* the distance between the quartiles as a share of it.
The engine's files are synced, hashed and complete when the clock stops; `cp` only leaves its copy in the page cache,
so `cp` with a sync of the copy stands beside it.

Where the time goes, in seconds of the median run: *read* is waiting for the source, as far as it was not read ahead by
one core; *compute* scales, codes, packing and errors, by all cores; *write* everything else done tensor by tensor:
laying out codes for the format, writing, the journal, and for Parquet a hash of each row; *finish* completing the
files, hashing them while they are synced, each by one core. SHA-256 runs at {{hash_rate:.2f}} GB/s here: no output can
be finished faster.
"""
ABOUT_SMALL = """
What a tensor costs beside its bytes: names, checks, kernel calls, reports and a line of the journal for each. F32, both
outputs, minmax; otherwise as above.
"""


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of one run by what was done."""

    total: float
    read: float
    compute: float
    write: float
    finish: float


class Stopwatch:
    """Adds up the seconds spent in the callables that it is put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: object, *names: str) -> Callable[[], None]:
        """Measure these methods of this object or class; call what is returned to stop."""
        before = {name: getattr(owner, name) for name in names}
        for name, call in before.items():
            setattr(owner, name, self._timed(call))

        def undo() -> None:
            for name, call in before.items():
                setattr(owner, name, call)

        return undo

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun

        return timed


def main(model_bytes: int = MODEL_BYTES, repeats: int = REPEATS, small_share: float = 1.0) -> None:
    """Measure, print and write the tables."""
    backend = make_backend(Job(Path(), Path(), ()).threads)
    large = "\n\n".join(_large(dtype, model_bytes, repeats, backend) for dtype in DTYPES)
    small = _small(repeats, small_share, backend)
    write_result(
        "pipeline",
        "File to file",
        ABOUT.format(hash_rate=_hash_rate()),
        large,
        "## Many small tensors",
        ABOUT_SMALL,
        small,
    )


def _large(dtype: str, model_bytes: int, repeats: int, backend: Backend) -> str:
    with scratch(3 * model_bytes) as folder:
        note(f"writing a model of {model_bytes / GB:.1f} GB in {dtype}")
        model = write_model(folder / "model.safetensors", layered(model_bytes, dtype), dtype)
        warm(model.path)
        copy = _copied(model, repeats)
        synced = _copied(model, repeats, sync=True)
        rows = [_cells("`cp`", model, copy, copy), _cells("`cp`, and sync", model, synced, copy)]
        limits = []
        for method in METHODS:
            for formats in OUTPUTS:
                note(f"{dtype}, {method}, {', '.join(formats)}")
                taken = _quantized(Job(model.path, folder / "work", formats, method=method), repeats, backend)
                what = f"int4 {method}, {' and '.join(formats)}"
                rows.append(_cells(what, model, Samples(tuple(p.total for p in taken)), copy, _middle(taken)))
            limits.append(f"{method} into both: {_shares(_middle(taken))}")
        head = ("", "time", "spread", "GB/s", "of cp", "read", "compute", "write", "finish")
        title = f"## {model.nbytes / GB:.2f} GB in {dtype}, {model.tensors} tensors"
        return "\n\n".join([title, table(head, rows), f"What limits it: {'; '.join(limits)}."])


def _small(repeats: int, share: float, backend: Backend) -> str:
    rows = []
    for what, count, shape in SMALL:
        shapes = equal(max(1, int(count * share)), shape)
        note(f"{what}")
        rows.append(_small_row(what, shapes, repeats, backend))
    return table(("", "MB", "time", "spread", "per tensor", "MB/s", "read", "compute", "write", "finish"), rows)


def _small_row(what: str, shapes: Shapes, repeats: int, backend: Backend) -> list[str]:
    with scratch(1 << 30) as folder:
        model = write_model(folder / "model.safetensors", shapes, "F32")
        taken = _quantized(Job(model.path, folder / "work", BOTH), repeats, backend)
        times = Samples(tuple(p.total for p in taken))
        return [
            what,
            f"{model.nbytes / 1e6:.0f}",
            f"{times.median:.3f} s",
            f"{times.spread:.0%}",
            f"{times.median / len(shapes) * 1e6:,.0f} µs",
            f"{model.nbytes / 1e6 / times.median:,.0f}",
            *_part_cells(_middle(taken)),
        ]


def _quantized(job: Job, repeats: int, backend: Backend) -> list[Parts]:
    _settle([job.work])
    run(job, backend)  # does not count: the first one maps memory and loads kernels
    taken = []
    for _ in range(repeats):
        _settle([job.work])
        taken.append(_parts(job, backend))
    _settle([job.work])
    return taken


def _parts(job: Job, backend: Backend) -> Parts:
    """One run, taken apart from outside: the engine knows nothing of it."""
    read, compute, finish = Stopwatch(), Stopwatch(), Stopwatch()
    undo_all = [
        read.around(ReadAhead, "rows", "raw"),
        compute.around(backend, "quantize", "observe", "tensor_grid"),
        finish.around(pipeline._Run, "_finish"),
    ]
    begun = time.perf_counter()
    try:
        run(job, backend)
    finally:
        for undo in undo_all:
            undo()
    total = time.perf_counter() - begun
    tensors = total - finish.seconds
    rest = max(0.0, tensors - read.seconds - compute.seconds)
    return Parts(total, read.seconds, compute.seconds, rest, total - tensors)


def _copied(model: Model, repeats: int, *, sync: bool = False) -> Samples:
    target = model.path.with_suffix(".copy")

    def copy() -> None:
        subprocess.run(["cp", model.path, target], check=True)
        if sync:
            with target.open("rb") as file:
                os.fsync(file.fileno())

    taken = []
    for _ in range(repeats + 1):
        target.unlink(missing_ok=True)
        _settle([])
        taken.append(seconds(copy))
    target.unlink()
    return Samples(tuple(taken[1:]))


def _settle(folders: Sequence[Path]) -> None:
    """Remove what the last run wrote, and let the disk finish it."""
    tidy(folders)
    os.sync()


def _middle(taken: Sequence[Parts]) -> Parts:
    return sorted(taken, key=lambda p: p.total)[len(taken) // 2]


def _cells(what: str, model: Model, times: Samples, copy: Samples, parts: Parts | None = None) -> list[str]:
    return [
        what,
        f"{times.median:.2f} s",
        f"{times.spread:.0%}",
        f"{model.nbytes / GB / times.median:.2f}",
        f"{copy.median / times.median:.2f}",
        *(_part_cells(parts) if parts else [""] * 4),
    ]


def _shares(parts: Parts) -> str:
    """Where the time went, the largest share first."""
    named = {"reading": parts.read, "computing": parts.compute, "writing": parts.write, "finishing": parts.finish}
    ordered = sorted(named.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {took / parts.total:.0%}" for name, took in ordered)


def _hash_rate() -> float:
    """GB/s of SHA-256 on one core."""
    data = bytes(1 << 26)
    return len(data) / GB / measure(lambda: hashlib.sha256(data).digest(), repeats=3).median


def _part_cells(parts: Parts) -> list[str]:
    return [f"{s:.2f}" for s in (parts.read, parts.compute, parts.write, parts.finish)]


if __name__ == "__main__":
    main()
