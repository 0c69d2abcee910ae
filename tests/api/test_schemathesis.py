"""The whole document against a running server that asks for keys: no 5xx, and no answer that it does not announce.

`python -m bench.fuzz_api` does the same at length. What is not checked, and why, stands in schemathesis.toml.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from service.api.openapi import PATH
from tests.api.fuzzed import Run, run_schemathesis
from tests.api.keyed import Keyed
from tests.conftest import SEED

#: Their bodies have so many fields that trying out the limits of each takes minutes: left to the long run.
LARGE = "create_job|create_batch|create_plan|quantize_tensors"
EXAMPLES = 4

Fuzz = Callable[..., Run]


@pytest.fixture
def fuzz(keyed: Keyed, model: Path, tmp_path: Path) -> Fuzz:
    """Runs schemathesis with some options, as a tenant with a key of its own."""
    key = keyed.client("fuzzer").text

    def run(*options: str) -> Run:
        print(f"TEST_SEED={SEED}")
        return run_schemathesis(
            keyed.server.base_url, tmp_path, *options, model=model, seed=SEED, max_examples=EXAMPLES, key=str(key)
        )

    return run


def test_every_limit_of_every_parameter_is_kept(fuzz: Fuzz, operation_ids: set[str]) -> None:
    run = fuzz("--phases", "coverage", "--exclude-operation-id-regex", f"^({LARGE})$")
    assert run.status == 0, run.output
    assert run.report["operations"]["tested"] == len(operation_ids) - len(LARGE.split("|"))
    assert run.report["test_cases"]["generated"] > 200


def test_what_is_drawn_at_random_is_answered_as_announced_alone_and_in_sequences(
    fuzz: Fuzz, operation_ids: set[str]
) -> None:
    run = fuzz("--phases", "fuzzing,stateful")
    assert run.status == 0, run.output
    assert run.report["operations"]["tested"] == len(operation_ids)
    assert {phase: run.report["phases"][phase]["status"] for phase in ("fuzzing", "stateful")} == {
        "fuzzing": "success",
        "stateful": "success",
    }
    accepted = run.report["valid_rates"]["POST /v1/jobs"]["fuzzing"]["accepted"]
    assert accepted, "no job was made, so nothing was seen of any"


@pytest.fixture(scope="module")
def operation_ids() -> set[str]:
    """The calls of the committed document."""
    paths = json.loads(PATH.read_text(encoding="utf-8"))["paths"].values()
    return {operation["operationId"] for path in paths for operation in path.values()}
