"""Peak memory of a run: it has to follow the row block, neither the model nor its largest tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.common import GB, GIB, MIB, note, table, write_result
from bench.engine import BLOCK_BYTES, Job, Watched, run_watched
from bench.models import Model, scratch, with_giant, write_model

LIMIT_BYTES = GIB
FORMATS = ("compressed-tensors", "parquet")
#: Method, and bytes of the model and of its largest tensor.
RUNS = (("minmax", 1 << 30, 1 << 29), ("mse", 1 << 30, 1 << 29), ("minmax", 1 << 32, 1 << 31))

ABOUT = f"""
A fresh process quantizes a BF16 safetensors file to 4 bits in groups of 128, both outputs ({" and ".join(FORMATS)}) at
once, with blocks of {BLOCK_BYTES // MIB} MiB. Its `RssAnon` (memory of its own; pages of files are the kernel's to take
back) is read every 2 ms. *Before* is that memory with everything imported and compiled and no model opened; *peak* the
largest value seen, and *above* the difference: what the run itself takes. `VmHWM` is the kernel's own mark, without
gaps between samples; it counts mapped libraries as well.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One run."""

    model: Model
    giant_bytes: int
    method: str
    watched: Watched

    def cells(self) -> list[str]:
        """As the table shows it."""
        peak, before = self.watched.peak, self.watched.baseline_bytes
        return [
            f"{self.model.nbytes / GB:.2f} GB, one tensor of {self.giant_bytes / GB:.2f} GB",
            self.method,
            f"{before / MIB:.0f} MiB",
            f"{peak.anonymous / MIB:.0f} MiB",
            f"{(peak.anonymous - before) / MIB:.0f} MiB",
            f"{peak.high_water / MIB:.0f} MiB",
            f"{self.watched.seconds:.1f} s",
        ]


def main(runs: Sequence[tuple[str, int, int]] = RUNS) -> None:
    """Measure, print and write the table; ends with status 1 when the limit is passed."""
    rows = [_run(*one) for one in runs]
    head = ("model", "method", "RssAnon before", "peak", "above", "VmHWM", "time")
    worst = max(row.watched.peak.anonymous for row in rows)
    verdict = f"Highest peak: {worst / MIB:.0f} MiB; the limit is {LIMIT_BYTES / MIB:.0f} MiB."
    write_result("memory", "Peak memory", ABOUT, table(head, (row.cells() for row in rows)), verdict)
    if worst >= LIMIT_BYTES:
        raise SystemExit("bench: memory is not bounded as promised")


def _run(method: str, total: int, giant: int) -> Row:
    with scratch(2.5 * total) as folder:
        note(f"writing a model of {total / GB:.1f} GB")
        model = write_model(folder / "model.safetensors", with_giant(total, giant, "BF16"), "BF16")
        note(f"quantizing {model.nbytes / GB:.1f} GB with {method}")
        return Row(model, giant, method, run_watched(Job(model.path, folder / "work", FORMATS, method=method)))


if __name__ == "__main__":
    main()
