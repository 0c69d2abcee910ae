"""From file to file, in this process, beside `cp` of the same source in the same run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from bench.charts import Bar, Chart
from bench.common import GB, MIB, Samples, cores, measure, note, seconds, table, write_result
from bench.engine import BLOCK_BYTES, Job, make_backend, run, tidy
from bench.models import Model, Shapes, equal, layered, scratch, warm, write_model
from service.engine.backends.base import Backend
from service.engine.checkpoint import Entry
from service.engine.formats.registry import open_model
from service.engine.formats.safetensors_header import build_header
from service.engine.plan import make_plan
from service.engine.report import OutputReport

MODEL_BYTES = 1_000_000_000
REPEATS = 5
SMALL_REPEATS = 2
DTYPES = ("F32", "BF16")
METHODS = ("minmax", "mse")
COMPRESSED, BOTH = ("compressed-tensors",), ("compressed-tensors", "parquet")
OUTPUTS = (COMPRESSED, ("parquet",), BOTH)
#: What has to hold: time of `cp` over ours, ours over a cold read, and small tensors over large ones.
COPY_MARK, COLD_MARK, SMALL_MARK = 1.0, 1.15, 1.5
#: Pairs of many small tensors and the same bytes in large ones: (what, count, shape) of F32.
SMALL = (
    (
        ("100,000 tensors of 4 KB, too small to be quantized: copied", 100_000, (8, 128)),
        ("the same bytes in 10 tensors, quantized", 10, (80_000, 128)),
    ),
    (
        ("5,000 tensors of 32 KB, quantized", 5000, (64, 128)),
        ("the same bytes in 4 tensors, quantized", 4, (80_000, 128)),
    ),
)
PARTS = ("read", "compute", "write", "hash")

ABOUT = f"""
The engine in this process quantizes a safetensors file to 4 bits in groups of 128, with zero points, blocks of
{BLOCK_BYTES >> 20} MiB and all cores. Source and outputs lie on the same disk; the source is in the page cache.
GB/s is bytes of source by the median time, and *spread* the distance between the quartiles as a share of it.
The engine's files are synced, hashed and complete when the clock stops; `cp` only leaves its copy in the page cache,
so `cp` with a sync of the copy stands beside it.

Reading, computing, writing and hashing go on at once, so *CPU*, the seconds of all threads together, divided by the
cores is what no overlap can get below. Where the run itself was, in seconds of the median one: *read* is waiting for
the source, *compute* scales, codes, packing and errors, *write* waiting for the writer and completing files, *hash*
hashing what was not hashed on the way and waiting for the disk. SHA-256 runs at {{hash_rate:.2f}} GB/s on a core here.
"""
ABOUT_COLD = """
The same, after the pages of the source were dropped from the cache. *of read* is the time as a multiple of what reading
the file from its beginning to its end takes, cold as well.
"""
ABOUT_SMALL = """
What a tensor costs beside its bytes: names, checks, reports, events, a place in the journal and in both headers for
each. F32, compressed-tensors, minmax; otherwise as above.
"""


@dataclass(frozen=True, slots=True)
class Taken:
    """One run."""

    total: float
    cpu: float
    parts: tuple[float, ...]  # seconds, in the order of PARTS


def main(model_bytes: int = MODEL_BYTES, repeats: int = REPEATS) -> None:
    """Measure, print and write the tables."""
    backend = make_backend(Job(Path(), Path(), ()).threads)
    charts: list[Chart] = []
    large = "\n\n".join(_large(dtype, model_bytes, repeats, backend, charts) for dtype in DTYPES)
    write_result(
        "pipeline",
        "File to file",
        ABOUT.format(hash_rate=_hash_rate()),
        large,
        "## Cold",
        ABOUT_COLD,
        _cold(model_bytes, repeats, backend),
        "## Many small tensors",
        ABOUT_SMALL,
        _small(backend),
        charts=charts,
    )


def _large(dtype: str, model_bytes: int, repeats: int, backend: Backend, charts: list[Chart]) -> str:
    with scratch(3 * model_bytes) as folder:
        note(f"writing a model of {model_bytes / GB:.1f} GB in {dtype}")
        model = write_model(folder / "model.safetensors", layered(model_bytes, dtype), dtype)
        warm(model.path)
        copy = _copied(model, repeats)
        synced = _copied(model, repeats, sync=True)
        rows = [_cells("`cp`", model, copy, copy), _cells("`cp`, and sync", model, synced, copy)]
        verdict, bars = "", [Bar("cp", 1.0, ours=False)]
        for method in METHODS:
            for formats in OUTPUTS:
                note(f"{dtype}, {method}, {', '.join(formats)}")
                taken = _quantized(Job(model.path, folder / "work", formats, method=method), repeats, backend)
                times = _times(taken)
                what = f"int4 {method}, {' and '.join(formats)}"
                rows.append(_cells(what, model, times, copy, _middle(taken)))
                bars.append(Bar(what, copy.median / times.median))
                if (dtype, method, formats) == ("BF16", "minmax", COMPRESSED):
                    verdict = _copy_verdict(copy.median / times.median, _middle(taken))
        charts.append(Chart(f"{dtype}, file to file", "speed as a multiple of cp", bars))
        head = ("", "time", "spread", "GB/s", "of cp", "CPU", *PARTS)
        title = f"## {model.nbytes / GB:.2f} GB in {dtype}, {model.tensors} tensors"
        return "\n\n".join(filter(None, [title, table(head, rows), verdict]))


def _copy_verdict(of_copy: float, taken: Taken) -> str:
    mark = f"Mark: int4 minmax into compressed-tensors no slower than `cp`: {of_copy:.2f} of it"
    if of_copy >= COPY_MARK:
        return f"{mark}, met."
    count = cores()
    return (
        f"{mark}, missed. {taken.cpu:.2f} s of processor time on {count} cores are {taken.cpu / count:.2f} s at"
        " least: reading into memory, kernels, storing and SHA-256 each take their share, and `cp` only moves."
    )


def _cold(model_bytes: int, repeats: int, backend: Backend) -> str:
    with scratch(3 * model_bytes) as folder:
        note("cold: writing a model")
        model = write_model(folder / "model.safetensors", layered(model_bytes, "BF16"), "BF16")
        job = Job(model.path, folder / "work", COMPRESSED)
        plain = Samples(tuple(_after(model.path, lambda: warm(model.path)) for _ in range(repeats)))
        cpu = time.process_time()
        ours = Samples(tuple(_after(model.path, lambda: run(job, backend), job.work) for _ in range(repeats)))
        least = (time.process_time() - cpu) / repeats / cores()
        share = ours.median / plain.median
        rows = [_cold_row("reading it", model, plain, plain), _cold_row("int4 minmax", model, ours, plain)]
        verdict = f"Mark: at most {COLD_MARK:g} of the read: {share:.2f}, {'met' if share <= COLD_MARK else 'missed'}."
        reason = f" Of {ours.median:.2f} s {least:.2f} s are what all cores take for the work, without any waiting."
        return f"{table(('BF16', 'time', 'spread', 'GB/s', 'of read'), rows)}\n\n{verdict}{reason}"


def _after(source: Path, call: Callable[[], object], work: Path | None = None) -> float:
    """Seconds of a call that finds nothing of the source in the page cache."""
    _settle([work] if work is not None else [])
    with source.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return seconds(call)


def _cold_row(what: str, model: Model, times: Samples, plain: Samples) -> list[str]:
    rate = model.nbytes / GB / times.median
    share = times.median / plain.median
    return [what, f"{times.median:.2f} s", f"{times.spread:.0%}", f"{rate:.2f}", f"{share:.2f}"]


def _small(backend: Backend) -> str:
    head = ("", "MB", "time", "spread", "per tensor", "MB/s", "CPU", *PARTS)
    rows, verdicts = [], []
    for small, large in SMALL:
        ours, parts, row = _small_row(small, backend)
        theirs, _, other = _small_row(large, backend)
        rows += [row, other]
        times = ours.median / theirs.median
        name = f"tensors of {small[2][0] * small[2][1] * 4 >> 10} KB at most {SMALL_MARK:g} × the same in large ones"
        verdicts.append(f"Mark: {name}: {times:.1f} ×, {'met' if times <= SMALL_MARK else 'missed'}.")
        if times > SMALL_MARK:
            allowed, alone = SMALL_MARK * theirs.median / small[1], sum(parts.values()) / small[1]
            each = ", ".join(f"{taken / small[1] * 1e6:.1f} µs {what}" for what, taken in parts.items())
            verdicts.append(
                f"It would leave {allowed * 1e6:.1f} µs for a tensor. Measured alone, each takes {each}: together"
                f" {alone * 1e6:.1f} µs, no two at once but for SHA-256, for Python runs one thread at a time."
            )
    return f"{table(head, rows)}\n\n{' '.join(verdicts)}"


def _small_row(case: tuple[str, int, tuple[int, int]], backend: Backend) -> tuple[Samples, dict[str, float], list[str]]:
    """Times of the runs, of parts of them by themselves, and a row of the table."""
    what, count, shape = case
    note(what)
    shapes: Shapes = equal(count, shape)
    with scratch(3 << 30) as folder:
        model = write_model(folder / "model.safetensors", shapes, "F32")
        job = Job(model.path, folder / "work", COMPRESSED)
        taken = _quantized(job, SMALL_REPEATS, backend)
        times = _times(taken)
        return (
            times,
            _parts_alone(job, run(job, backend).outputs[0]),
            [
                what,
                f"{model.nbytes / 1e6:.0f}",
                f"{times.median:.3f} s",
                f"{times.spread:.0%}",
                f"{times.median / len(shapes) * 1e6:,.0f} µs",
                f"{model.nbytes / 1e6 / times.median:,.0f}",
                *_part_cells(_middle(taken)),
            ],
        )


def _parts_alone(job: Job, output: OutputReport) -> dict[str, float]:
    """Seconds, for all tensors, of what is done for each: by themselves, with nothing beside them."""
    entry = Entry(tuple((tensor,) for tensor in output.tensors), (), (), 0.0)
    with closing(open_model(job.work / output.name)) as written:
        places = [(t.name, t.dtype, t.shape, t.offset, t.offset + t.nbytes) for t in written.tensors]
    with closing(open_model(job.source)) as reader:
        calls: dict[str, Callable[[], object]] = {
            "opening the model and checking its header": lambda: open_model(job.source).close(),
            "deciding what becomes of it": lambda: make_plan(reader, job.outputs()),
            "its line in the journal": entry.to_line,
            "its event": lambda: [tensor.completed(output.name) for tensor in output.tensors],
            "its place in the new header": lambda: build_header(places, {}, MIB),
        }
        parts = {what: measure(call, repeats=SMALL_REPEATS).median for what, call in calls.items()}
    return parts | {"SHA-256": output.quantized_bytes / GB / _hash_rate()}


def _quantized(job: Job, repeats: int, backend: Backend) -> list[Taken]:
    _settle([job.work])
    run(job, backend)  # does not count: the first one maps memory and loads kernels
    taken = []
    for _ in range(repeats):
        _settle([job.work])
        taken.append(_taken(job, backend))
    _settle([job.work])
    return taken


def _taken(job: Job, backend: Backend) -> Taken:
    begun, cpu = time.perf_counter(), time.process_time()
    stages = run(job, backend).stages
    total, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return Taken(total, cpu, tuple(stages.get(part, 0.0) for part in ("read", "quantize", "write", "hash")))


def _times(taken: Sequence[Taken]) -> Samples:
    return Samples(tuple(one.total for one in taken))


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


def _middle(taken: Sequence[Taken]) -> Taken:
    return sorted(taken, key=lambda one: one.total)[len(taken) // 2]


def _cells(what: str, model: Model, times: Samples, copy: Samples, taken: Taken | None = None) -> list[str]:
    return [
        what,
        f"{times.median:.2f} s",
        f"{times.spread:.0%}",
        f"{model.nbytes / GB / times.median:.2f}",
        f"{copy.median / times.median:.2f}",
        *(_part_cells(taken) if taken else [""] * (1 + len(PARTS))),
    ]


def _hash_rate() -> float:
    """GB/s of SHA-256 on one core."""
    data = bytes(1 << 26)
    return len(data) / GB / measure(lambda: hashlib.sha256(data).digest(), repeats=3).median


def _part_cells(taken: Taken) -> list[str]:
    return [f"{s:.2f}" for s in (taken.cpu, *taken.parts)]


if __name__ == "__main__":
    main()
