"""What jobs cost by size, and how well that is foretold: a formula fitted here, and the predictions of `/v1/plans`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.charts import Bar, Chart
from bench.common import GB, MB, MIB, Samples, cores, measure, note, table, write_result
from bench.engine import BLOCK_BYTES, Job, make_backend, run, run_watched
from bench.models import Model, equal, layered, scratch, write_model
from service.engine.backends.base import Backend
from service.engine.cost_model import Rates, Work, fit, work_of
from service.engine.estimate import Estimate, estimate
from service.engine.formats.registry import open_model
from service.engine.memory_need import need_to_quantize
from service.engine.plan import Plan, make_plan

#: Bytes of BF16 of the models that are run; beside them there is one of many small tensors.
SIZES = (30_000_000, 250_000_000, 1_000_000_000)
MANY, SMALL_SHAPE = 2000, (64, 128)
WIDTH = 1024
#: What is done with them, as a configuration. Copies tell writing from reading.
KINDS: dict[str, dict[str, Any]] = {"minmax": {}, "mse": {"method": "mse"}, "copied": {"skip": ["*"]}}
FORMATS = ("compressed-tensors", "parquet")
#: Above it there is minmax alone: the others take as long as all the rest, and tell nothing new.
LARGE_BYTES = 500_000_000
REPEATS = 3
#: Parameters and width of models on paper, and on what they run.
ON_PAPER = ((1e9, 2048), (8e9, 4096), (70e9, 8192), (405e9, 16384), (1e12, 16384))
CORES, GPUS = (2, 8, 64), (1, 8)
#: Bytes per second of BF16 that an H100 is fed with over PCIe 5 from pinned memory, and that its kernels take: the
#: published limits and the instruction counts of the design notes. Nothing of it was measured here.
UPLOAD, KERNELS = 55e9, {"minmax": 2.5e12, "mse": 150e9}

ABOUT = f"""
Seconds of a job = those of its kernels on all cores + so many for the run, for each tensor that an output copies and
each that it quantizes, for each byte read and each written. The kernels are timed on a block in the cache, as
`/v1/plans` does; the other five rates come from the runs below by least squares of relative errors. *Fitted* is what
the formula says with these rates, of one output. *Plan* is what `/v1/plans` says: the same formula with rates that the
service takes from runs of models of less than 40 MB when it is first asked. Models are generated, BF16, in so many
tensors, in the page cache, to 4 bits in groups of 128, in blocks of {BLOCK_BYTES // MIB} MiB; times are medians of
{REPEATS}, synced files included.
"""

MEMORY = """
## Memory

Above the idle process, the highest seen of a run in a process of its own beside the plan's, which is meant to be a
little high: admission goes by it.
"""

PAPER = """
## On paper

The same formula for models that exist as headers only: the plans are real, and so is the memory that admission goes
by, above the idle service. What the kernels take is divided by the cores, as if memory kept pace with them; the run,
its tensors, reading and writing are left as they are, which is one thread each, with storage as fast as the page cache
here. **Columns with a star are a model of H100s and not measured**: kernels as fast as PCIe ({upload:.0f} GB/s each) or
the published rates allow, everything else as on this machine. Int4, compressed-tensors.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A job, what there was to do, how long it took, and what was foretold."""

    model: Model
    kind: str
    job: Job
    work: Work
    seconds: Samples
    predicted: Estimate

    @property
    def name(self) -> str:
        """As shown."""
        size = f"{self.model.nbytes / MB:.0f} MB in {self.model.tensors}"
        return f"{size}, {self.kind}, {' and '.join(self.job.formats)}"

    @property
    def error(self) -> float:
        """Of the plan, as a share of what it took."""
        return self.predicted.seconds / self.seconds.median - 1


def main(sizes: Sequence[int] = SIZES) -> None:
    """Measure, fit, print and write the page."""
    with scratch(3 * max(sizes)) as folder:
        backend = make_backend(cores())
        rows = list(_measure(folder, backend, sizes))
        rates = {name: fit([(r.work, r.seconds.median) for r in rows if r.job.formats == (name,)]) for name in FORMATS}
        memory = [_memory(row) for row in rows if row.kind == "minmax" and row.model.nbytes >= sorted(sizes)[1]]
        paper = list(_paper(folder, backend, rates[FORMATS[0]]))
    errors = [abs(row.error) for row in rows]
    found = f"The plan is off by {median(errors):.0%} in the median of {len(errors)} jobs, {max(errors):.0%} at worst."
    foretold = [Bar(row.name, 1 + row.error, mark=1.0) for row in rows]
    write_result(
        "scaling",
        "What jobs cost, by size",
        ABOUT,
        table(("job", "took", "spread", "fitted", "off by", "plan", "off by"), (_cells(row, rates) for row in rows)),
        found,
        table(
            ("rates", "run", "copied", "quantized", "read", "written"),
            (_rate_cells(name, r) for name, r in rates.items()),
        ),
        MEMORY,
        table(("job", "took", "plan", "of plan"), memory),
        PAPER.format(upload=UPLOAD / GB),
        *(f"### {method}\n\n{text}" for method, text in paper),
        charts=[Chart("What the plan foretold", "share of what it took", foretold)],
    )


def _measure(folder: Path, backend: Backend, sizes: Sequence[int]) -> Iterator[Row]:
    shapes = [equal(MANY, SMALL_SHAPE), *(layered(size, "BF16", width=WIDTH) for size in sizes)]
    for index, chosen in enumerate(shapes):
        model = write_model(folder / f"{index}.safetensors", chosen, "BF16")
        kinds = KINDS if model.nbytes <= LARGE_BYTES else {"minmax": KINDS["minmax"]}
        for kind, config in kinds.items():
            for formats in (*((name,) for name in FORMATS), FORMATS):
                job = Job(model.path, folder / "work", formats, config=config)
                plan = _plan(job)
                # Before the run, as somebody who asks for a plan.
                predicted = estimate(plan, backend, BLOCK_BYTES, folder)
                note(f"{model.nbytes / GB:.2f} GB, {kind}, into {' and '.join(formats)}")
                seconds = measure(lambda job=job: run(job, backend), repeats=REPEATS)  # type: ignore[misc]
                yield Row(model, kind, job, work_of(plan, backend), seconds, predicted)


def _plan(job: Job) -> Plan:
    with closing(open_model(job.source)) as reader:
        return make_plan(reader, job.outputs())


def _cells(row: Row, rates: dict[str, Rates]) -> list[str]:
    took = row.seconds.median
    cells = [row.name, f"{took:.3f} s", f"{row.seconds.spread:.0%}"]
    if len(row.job.formats) == 1:
        fitted = rates[row.job.formats[0]].seconds(row.work)
        cells += [f"{fitted:.3f} s", f"{fitted / took - 1:+.0%}"]
    else:
        cells += ["", ""]
    return [*cells, f"{row.predicted.seconds:.3f} s", f"{row.error:+.0%}"]


def _rate_cells(name: str, r: Rates) -> list[str]:
    moved = (f"{1 / rate / GB:.2f} GB/s" if rate else "nothing" for rate in (r.read_s, r.write_s))
    return [name, f"{r.run_s * 1e3:.1f} ms", f"{r.copied_s * 1e6:.0f} µs", f"{r.quantized_s * 1e6:.0f} µs", *moved]


def _memory(row: Row) -> list[str]:
    watched = run_watched(row.job)
    took, foretold = watched.peak.anonymous - watched.baseline_bytes, row.predicted.memory_bytes
    return [row.name, f"{took / MIB:.0f} MiB", f"{foretold / MIB:.0f} MiB", f"{took / foretold:.0%}"]


def _paper(folder: Path, backend: Backend, rates: Rates) -> Iterator[tuple[str, str]]:
    models = []
    for parameters, width in ON_PAPER:
        path = folder / f"paper-{parameters:.0f}.safetensors"
        models.append(write_model(path, layered(int(2 * parameters), "BF16", width=width), "BF16", is_sparse=True))
    columns = (*(f"{n} cores" for n in CORES), *(f"{n} GPU{'s' if n > 1 else ''} *" for n in GPUS))
    head = ("parameters", "source", "written", "tensors", "memory", *columns)
    for method in KERNELS:
        rows = [_paper_cells(model, method, backend, rates) for model in models]
        yield method, table(head, rows)


def _paper_cells(model: Model, method: str, backend: Backend, rates: Rates) -> list[str]:
    plan = _plan(Job(model.path, model.path.parent, FORMATS[:1], method=method))
    work = work_of(plan, backend)
    per_gpu = model.nbytes / min(UPLOAD, KERNELS[method])
    computing = [*(work.compute_s * cores() / n for n in CORES), *(per_gpu / n for n in GPUS)]
    return [
        f"{model.nbytes / 2 / 1e9:.0f}B",
        f"{work.read_bytes / GB:.0f} GB",
        f"{work.written_bytes / GB:.1f} GB",
        str(work.copied + work.quantized),
        f"{need_to_quantize(plan, BLOCK_BYTES).nbytes / MIB:.0f} MiB",
        *(_duration(rates.seconds(replace(work, compute_s=s))) for s in computing),
    ]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    main()
