"""schemathesis against the whole document of a server, with and without keys: `python -m bench.fuzz_api [EXAMPLES]`."""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.common import note, table, write_result
from tests.api.conftest import save_model
from tests.api.fuzzed import CONFIG, Run, run_schemathesis
from tests.api.keyed import Keyed
from tests.server import Server

#: Random cases of each call, and sequences of calls.
EXAMPLES = 10

ABOUT = f"""
schemathesis makes calls from the OpenAPI document that the server itself serves: every limit of every parameter,
random ones that fit and that do not, and sequences that follow the document's links. Each answer is held against the
document: status, media type, headers and body; whether what breaks the schema is refused, and what fits is taken;
whether a call without its key is (on the server that asks for keys). What is switched off, and why, stands in
`{CONFIG.parent.parent.name}/{CONFIG.parent.name}/{CONFIG.name}`. *accepted* are the calls that were answered with 2xx
among those that fit the schema.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A server, and what came of its run."""

    name: str
    run: Run

    def cells(self) -> list[str]:
        """As the table shows it."""
        report = self.run.report
        rates = [phase for phases in report["valid_rates"].values() for phase in phases.values()]
        accepted = sum(phase["accepted"] for phase in rates)
        fitting = sum(sum(phase.values()) for phase in rates)
        return [
            self.name,
            f"{report['operations']['tested']} of {report['operations']['total']}",
            f"{report['test_cases']['generated']:,}",
            f"{accepted:,} of {fitting:,}",
            f"{report['running_time']:.0f}",
            f"{len(report['failures'])}",
            f"{len(report['errors'])}",
        ]


def main() -> None:
    """Run, print and write the table; ends with status 1 at a failure."""
    examples = int(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLES
    seed = secrets.randbelow(1 << 31)
    with TemporaryDirectory() as folder:
        rows = [_run(Path(folder) / name, name, seed, examples) for name in ("without keys", "with keys")]
    head = ("server", "calls", "cases", "accepted", "seconds", "failures", "errors")
    found = table(head, (row.cells() for row in rows))
    how = f"Seed {seed}, {examples} random cases of each call."
    write_result("fuzz_api", "schemathesis", ABOUT, found, how, packages=("schemathesis", "hypothesis"))
    if failed := [row for row in rows if row.run.status]:
        raise SystemExit("\n".join(row.run.output for row in failed))


def _run(folder: Path, name: str, seed: int, examples: int) -> Row:
    note(name)
    with_keys = name == "with keys"
    model = save_model(folder / "models" / "small", layers=3, rows=16, cols=128)
    server = Server(folder / "data", [model.parent], require_keys=with_keys, requests_per_minute=10**7)
    about = {"model": model, "seed": seed, "max_examples": examples}
    if not with_keys:
        server.start()
        run = run_schemathesis(server.base_url, folder, **about)
        server.stop()
        return Row(name, run)
    keyed = Keyed(server)
    run = run_schemathesis(server.base_url, folder, **about, key=str(keyed.client("fuzzer").text))
    keyed.stop()
    return Row(name, run)


if __name__ == "__main__":
    main()
