"""Peak memory of a run: it has to follow the row block, neither the model nor its largest tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.charts import Bar, Chart
from bench.common import GB, MIB, note, table, write_result
from bench.engine import BLOCK_BYTES, Job, Watched, run_watched
from bench.models import Model, equal, layered, scratch, write_model

LIMIT_BYTES = 4 * BLOCK_BYTES + 128 * MIB
#: How much more the largest model may take than the smallest one, for the same job.
FLAT_BYTES = 32 * MIB
COMPRESSED, PARQUET = ("compressed-tensors",), ("parquet",)


@dataclass(frozen=True, slots=True)
class Case:
    """A model to be made, and what to do with it; `alone` is of a single tensor."""

    nbytes: int
    formats: tuple[str, ...]
    method: str = "minmax"
    alone: bool = False


CASES = (
    *(Case(size * 10**9, COMPRESSED) for size in (1, 5, 20)),
    Case(8 * 10**9, COMPRESSED, alone=True),
    *(Case(size * 10**9, PARQUET) for size in (1, 5, 20)),
    Case(8 * 10**9, PARQUET, alone=True),
    Case(10**9, COMPRESSED + PARQUET, "mse"),
)

ABOUT = f"""
A fresh process quantizes a BF16 safetensors file to 4 bits in groups of 128, in blocks of {BLOCK_BYTES // MIB} MiB. Its
`RssAnon` (memory of its own; pages of files are the kernel's to take back) is read every 2 ms. *Before* is that memory
with everything imported and compiled and no model opened; *peak* the largest value seen, and *above* the difference:
what the run itself takes. `VmHWM` is the kernel's own mark, without gaps between samples; it counts mapped libraries as
well. Files of more than a gigabyte are sparse: the kernel reads zeros, of which the engine makes as much as of any
other weights. A mark is {LIMIT_BYTES // MIB} MiB above: four blocks and 128 MiB.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One run."""

    case: Case
    model: Model
    watched: Watched

    @property
    def above_bytes(self) -> int:
        """What the run took."""
        return self.watched.peak.anonymous - self.watched.baseline_bytes

    def cells(self) -> list[str]:
        """As the table shows it."""
        peak = self.watched.peak
        tensors = "1 tensor" if self.model.tensors == 1 else f"{self.model.tensors} tensors"
        return [
            f"{self.model.nbytes / GB:.2f} GB, {tensors}",
            f"{self.case.method}, {' and '.join(self.case.formats)}",
            f"{self.watched.baseline_bytes / MIB:.0f} MiB",
            f"{peak.anonymous / MIB:.0f} MiB",
            f"{self.above_bytes / MIB:.0f} MiB",
            f"{peak.high_water / MIB:.0f} MiB",
            f"{self.watched.seconds:.1f} s",
            "met" if self.above_bytes <= LIMIT_BYTES else "missed",
        ]


def main(cases: Sequence[Case] = CASES) -> None:
    """Measure, print and write the table; ends with status 1 when a mark is missed."""
    rows = [_run(case) for case in cases]
    head = ("model", "job", "RssAnon before", "peak", "above", "VmHWM", "time", "mark")
    verdicts = [verdict for formats in (COMPRESSED, PARQUET) if (verdict := _flat(formats, rows))]
    page = [table(head, (row.cells() for row in rows)), *(text for text, _ in verdicts)]
    write_result("memory", "Peak memory", ABOUT, *page, charts=[_chart(rows)])
    if any(row.above_bytes > LIMIT_BYTES for row in rows) or not all(is_flat for _, is_flat in verdicts):
        raise SystemExit("bench: memory is not bounded as promised")


def _chart(rows: Sequence[Row]) -> Chart:
    bars = [
        Bar(f"{row.model.nbytes / GB:.0f} GB, {row.cells()[1]}", row.above_bytes / MIB, mark=LIMIT_BYTES / MIB)
        for row in rows
    ]
    return Chart("Peak memory above the idle service", "MiB", bars)


def _flat(formats: tuple[str, ...], rows: Sequence[Row]) -> tuple[str, bool] | None:
    """Whether the size of the model makes no difference, in words as well."""
    alike = [row for row in rows if row.case.formats == formats and row.case.method == "minmax" and not row.case.alone]
    if len(alike) < 2:
        return None
    smallest, largest = min(alike, key=_size), max(alike, key=_size)
    more = largest.above_bytes - smallest.above_bytes
    sizes = f"{largest.model.nbytes / smallest.model.nbytes:.0f} times the model takes {more / MIB:+.0f} MiB"
    is_flat = more <= FLAT_BYTES
    return f"{formats[0]}: {sizes}; mark {FLAT_BYTES // MIB} MiB, {'met' if is_flat else 'missed'}.", is_flat


def _size(row: Row) -> int:
    return row.model.nbytes


def _run(case: Case) -> Row:
    is_sparse = case.nbytes > 10**9
    with scratch(0.7 * case.nbytes + (0 if is_sparse else case.nbytes)) as folder:
        shapes = equal(1, (case.nbytes // 2 // 4096, 4096)) if case.alone else layered(case.nbytes, "BF16")
        model = write_model(folder / "model.safetensors", shapes, "BF16", is_sparse=is_sparse)
        note(f"quantizing {model.nbytes / GB:.1f} GB with {case.method} into {' and '.join(case.formats)}")
        return Row(case, model, run_watched(Job(model.path, folder / "work", case.formats, method=case.method)))


if __name__ == "__main__":
    main()
