"""Runs one target in this process, guided by coverage: `python -m bench.fuzzing.run NAME --runs N`.

libFuzzer ends the process at a fault, a crash of a library, an input that takes too long, or too much memory, and
says with which input. What came of the inputs goes to a file as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import atheris

#: Of one input.
TIMEOUT_S = 20
#: Of the process, at any time; what one input takes is told by the table.
RSS_LIMIT_MB = 1500
#: Looked at for descriptors that were left open, after so many inputs.
LOOK_EVERY = 1000
#: Of inputs made by our own changes; libFuzzer's make the others.
OWN_SHARE = 0.5


def main() -> None:
    """Fuzz; never returns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    with atheris.instrument_imports(include=["service"], enable_loader_override=False):
        from bench.fuzzing.mutate import MAX_BYTES, mutate
        from bench.fuzzing.targets import targets

    target = targets([options.name])[0]
    work, corpus = options.folder / "work", options.folder / "corpus"
    work.mkdir(parents=True)
    corpus.mkdir()
    pool = target.seeds()
    for index, seed in enumerate(pool):
        (corpus / f"seed-{index:04}").write_bytes(seed)
    run = target.start(work)
    record = Record(options.folder / "outcome.json", options.runs)

    def one(data: bytes) -> None:
        record.add(run(data))

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < OWN_SHARE:
            return mutate(rng, data if rng.random() < 0.5 else rng.choice(pool), pool, target.tokens)[:max_size]
        return atheris.Mutate(data, max_size)

    flags = [
        f"-runs={options.runs}",
        f"-seed={options.seed}",
        f"-timeout={TIMEOUT_S}",
        f"-rss_limit_mb={RSS_LIMIT_MB}",
        f"-max_len={MAX_BYTES}",
        f"-artifact_prefix={options.folder}/",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()


class Record:
    """Counts what came of the inputs, and looks for descriptors left open."""

    def __init__(self, path: Path, runs: int) -> None:
        self._path, self._runs = path, runs
        self._outcomes: Counter[str] = Counter()
        self._count = 0
        self._begun = time.monotonic()
        self._before = _own_peak()
        self._descriptors = 0

    def add(self, outcome: str) -> None:
        """One more; raises AssertionError when descriptors are left open."""
        self._outcomes[outcome] += 1
        self._count += 1
        if self._count % LOOK_EVERY and self._count != self._runs:
            return
        found = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        self._descriptors = self._descriptors or found
        assert found <= self._descriptors, f"{found} descriptors are open, {self._descriptors} were before"
        self._write()

    def _write(self) -> None:
        told = {
            "inputs": self._count,
            "seconds": time.monotonic() - self._begun,
            "outcomes": dict(self._outcomes),
            "peak_bytes": _own_peak(),
            "before_bytes": self._before,
        }
        self._path.write_text(json.dumps(told))


def _own_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
