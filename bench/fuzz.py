"""Fuzzes every reader of what strangers send, a million inputs each: `python -m bench.fuzz [TARGET …] [--inputs N]`.

Each target runs in a process of its own, so that a crash of a library is noticed as one.
"""

from __future__ import annotations

import argparse
import json
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.common import MIB, cores, note, table, write_result
from bench.fuzzing.run import RSS_LIMIT_MB, TIMEOUT_S
from bench.fuzzing.targets import TARGETS, targets

INPUTS = 1_000_000
#: Of the outcomes of a target, those that are most.
SHOWN = 4

ABOUT = f"""
Each target is a function of the service that takes bytes of strangers. It may read them or refuse them with an error of
the documented kinds (a 4xx, or a failed job that says what is wrong); anything else ends the run: another exception, a
broken promise about the result, a crash of a library, an input that takes more than {TIMEOUT_S} s, more than
{RSS_LIMIT_MB} MiB, a file left open. Half of the inputs are made by libFuzzer (atheris), guided by the branches that
they reach in `service`, half by changes that know JSON and lengths (`bench/fuzzing/mutate.py`), all of them from valid
files and from files whose cells lie (`bench/fuzzing/seeds.py`). Parquet and Arrow are decoded by pyarrow's C++, whose
branches guide nothing. *memory* is what a target's process took above what it had before its first input.
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """A target with the end of what it wrote, and what came of its inputs."""

    name: str
    status: int
    end: str
    told: dict[str, Any]

    def cells(self) -> list[str]:
        """As the table shows it."""
        outcomes = sorted(self.told["outcomes"].items(), key=lambda item: -item[1])
        grown = self.told["peak_bytes"] - self.told["before_bytes"]
        what = ", ".join(f"{name} {100 * count / self.told['inputs']:.3g}%" for name, count in outcomes[:SHOWN])
        verdict = "none" if self.status == 0 else f"status {self.status}"
        return [
            self.name,
            f"{self.told['inputs']:,}",
            f"{self.told['seconds']:.0f}",
            f"{grown / MIB:.0f} MiB",
            str(len(outcomes)),
            what,
            verdict,
        ]


def main() -> None:
    """Fuzz, print and write the table; ends with status 1 at a fault."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description="Fuzz; the page goes to bench/results/.")
    parser.add_argument("names", nargs="*", metavar="TARGET", help=", ".join(target.name for target in TARGETS))
    parser.add_argument("--inputs", type=int, default=INPUTS)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    options = parser.parse_args()
    names = [target.name for target in targets(options.names)]
    note(f"seed {options.seed}")
    with scratch() as folder, ThreadPoolExecutor(cores()) as pool:
        ran = list(pool.map(lambda name: fuzz(name, options.inputs, options.seed, folder), names))
    head = ("target", "inputs", "seconds", "memory", "outcomes", "the most frequent", "faults")
    page = [ABOUT, table(head, (one.cells() for one in ran)), f"Seed {options.seed}, {cores()} targets at a time."]
    failed = [one for one in ran if one.status]
    if not options.names:
        write_result("fuzz", "Fuzzing", *page, packages=("atheris", "pyarrow", "numpy"))
    else:
        print(table(head, (one.cells() for one in ran)))
    for one in failed:
        print(f"{one.name} ended with {one.status}:\n{one.end}", file=sys.stderr)
    raise SystemExit(1 if failed else 0)


def fuzz(name: str, inputs: int, seed: int, folder: Path) -> Ran:
    """Run one target to its end or to its first fault."""
    place = folder / name.replace(" ", "_")
    place.mkdir()
    command = [sys.executable, "-m", "bench.fuzzing.run", name, f"--runs={inputs}", f"--seed={seed}"]
    done = subprocess.run([*command, f"--folder={place}"], capture_output=True, check=False)
    note(f"{name}: status {done.returncode}")
    outcome = place / "outcome.json"
    told = json.loads(outcome.read_text()) if outcome.exists() else _nothing()
    return Ran(name, done.returncode, _end_of(done, place), told)


def _nothing() -> dict[str, Any]:
    return {"inputs": 1, "seconds": 0.0, "outcomes": {}, "peak_bytes": 0, "before_bytes": 0}


def _end_of(done: subprocess.CompletedProcess[bytes], place: Path) -> str:
    """The end of what a target wrote, and the input that it ended with."""
    inputs: Sequence[Path] = [p for p in place.iterdir() if p.name.startswith(("crash-", "timeout-", "oom-", "slow-"))]
    kept = "".join(f"\n{path.name}: {path.read_bytes()[:2000]!r}" for path in inputs)
    return (done.stdout[-1000:] + done.stderr[-4000:]).decode(errors="replace") + kept


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: most targets write each input to a file."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


if __name__ == "__main__":
    main()
