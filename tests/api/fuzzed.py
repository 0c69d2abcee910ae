"""Runs schemathesis against a server: the whole document, every check that is not switched off with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIG = HERE / "schemathesis.toml"


@dataclass(frozen=True, slots=True)
class Run:
    """How a run ended, what it printed, and what it did as schemathesis tells it."""

    status: int
    output: str
    report: dict[str, Any]


def run_schemathesis(
    base_url: str, folder: Path, *options: str, model: Path, seed: int, max_examples: int, key: str = "none"
) -> Run:
    """Fuzz the server at `base_url`, which may read `model`; the report is written to `folder`."""
    report = folder / "schemathesis.json"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", f"{base_url}/openapi.json"),
        *("--no-color", "--continue-on-failure", "--generation-database", "none", "--request-timeout", "20"),
        *("--seed", str(seed), "--max-examples", str(max_examples)),
        *(("--header", f"Authorization: Bearer {key}") if key != "none" else ()),
        *("--report", "json", "--report-json-path", str(report)),
        *options,
    ]
    environment = os.environ | {"FUZZED_MODEL_URI": model.as_uri(), "FUZZED_KEY": key}
    # The configuration names its hooks from the root of the project.
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    found = json.loads(report.read_text()) if report.exists() else {}
    return Run(done.returncode, done.stdout + done.stderr, found)
