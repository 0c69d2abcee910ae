"""The committed OpenAPI document is what the code says, and what generators of clients need."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from service.api.app import create_app
from service.api.openapi import PATH, build, render
from service.api.problem_codes import CODES
from service.settings import Settings

#: The calls of the contract, each a method of a generated client.
OPERATIONS = {
    "create_job", "list_jobs", "get_job", "cancel_job", "stream_job_events", "get_job_report", "list_job_artifacts",
    "download_job_artifact", "download_job_archive", "create_plan", "quantize_tensors", "dequantize_tensors",
    "compare_tensors", "list_profiles", "list_schemes", "list_methods", "list_formats", "list_backends", "get_health",
    "get_readiness", "get_problem", "create_batch", "list_batches", "get_batch", "cancel_batch", "stream_batch_events",
    "check_blob", "upload_blob", "get_metrics", "collect_garbage",
}  # fmt: skip
VERBS = {
    "create", "list", "get", "cancel", "stream", "download", "quantize", "dequantize", "compare", "check", "upload",
    "collect",
}  # fmt: skip

JOB_BODY = """
{
  "kind": "quantize",
  "source": {"type": "uri", "uri": "file:///models/minilm"},
  "profile": "local",
  "config": {"bit_width": 4, "group_size": 128, "method": "mse", "min_accuracy": 0.98, "on_failure": "fallback"},
  "outputs": [{"format": "compressed-tensors"}, {"format": "gguf", "config": {"scheme": "q4_k"}}],
  "timeout_s": 3600, "priority": 0, "labels": {"model": "minilm"}
}
"""
JOB = """
{
  "id": "job_0193", "kind": "quantize", "status": "running",
  "created_at": "2026-01-01T00:00:00Z", "started_at": "2026-01-01T00:00:00Z",
  "request": {"kind": "validate", "original": {"type": "uri", "uri": "file:///a"},
              "quantized": {"type": "job", "job_id": "job_0192"}},
  "config": {"profile": "local"}, "labels": {},
  "progress": {"fraction": 0.42, "stage": "quantizing", "tensors_done": 31, "tensors_total": 101,
               "bytes_done": 0, "bytes_total": 0, "bytes_per_s": 0, "eta_s": 12.5},
  "links": {"self": "/a", "events": "/b", "report": "/c", "artifacts": "/d", "archive": "/e"}
}
"""


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The document as the code has it now."""
    return build(create_app(Settings()))


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def nodes(node: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a JSON tree with its place."""
    if isinstance(node, dict):
        yield place, node
        for key, value in node.items():
            yield from nodes(value, f"{place}/{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from nodes(value, f"{place}/{index}")


def test_the_committed_document_is_what_the_code_says(document: dict[str, Any]) -> None:
    assert PATH.read_text(encoding="utf-8") == render(document), "run `make openapi`"


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    validate(document)


def test_every_call_has_a_name_that_a_method_can_have(document: dict[str, Any]) -> None:
    names = [o["operationId"] for o in operations(document)]
    assert set(names) == OPERATIONS
    assert len(names) == len(OPERATIONS)
    assert {name.split("_")[0] for name in names} <= VERBS


def test_every_object_and_every_choice_has_a_name(document: dict[str, Any]) -> None:
    nameless = []
    for place, node in nodes(document):
        is_named = re.fullmatch(r"/components/schemas/[A-Za-z]+", place)
        if not is_named and ("enum" in node or "oneOf" in node or "discriminator" in node or "properties" in node):
            nameless.append(place)
    assert nameless == [], "models, unions and enums belong into components"
    assert not [name for name in document["components"]["schemas"] if not re.fullmatch(r"[A-Z][A-Za-z0-9]+", name)]
    assert "Body_" not in json.dumps(document)
    assert "HTTPValidationError" not in json.dumps(document)


def test_every_reference_leads_somewhere_and_every_model_is_used(document: dict[str, Any]) -> None:
    used = {node["$ref"].rsplit("/", 1)[1] for _, node in nodes(document) if isinstance(node.get("$ref"), str)}
    assert used == set(document["components"]["schemas"])


def test_unions_have_a_required_literal_tag(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    unions = {name: s for name, s in schemas.items() if "oneOf" in s}
    assert unions.keys() == {"JobRequest", "Source", "CalibrationSource", "Event"}
    for union in unions.values():
        tag = union["discriminator"]["propertyName"]
        for value, reference in union["discriminator"]["mapping"].items():
            member = schemas[reference.rsplit("/", 1)[1]]
            assert tag in member["required"]
            assert member["properties"][tag]["const"] == value


def test_nothing_is_null(document: dict[str, Any]) -> None:
    assert not [
        place for place, node in nodes(document) if node.get("type") == "null" or node.get("default", 0) is None
    ]


def test_every_call_says_what_a_problem_looks_like(document: dict[str, Any]) -> None:
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for operation in operations(document):
        refused = {s: r for s, r in operation["responses"].items() if s == "default" or s >= "400"}
        assert "default" in refused, operation["operationId"]
        assert all(r["content"] == problem for r in refused.values()), operation["operationId"]
        for status in refused.keys() & {"429", "503"}:
            assert "Retry-After" in refused[status]["headers"]
    assert document["components"]["schemas"]["ErrorCode"]["enum"] == list(CODES)


def test_binary_bodies_are_declared_as_such(document: dict[str, Any]) -> None:
    arrow = {"application/vnd.apache.arrow.stream": {"schema": {"type": "string", "format": "binary"}}}
    for operation in operations(document):
        if operation["operationId"].endswith("_tensors"):
            assert operation["requestBody"]["content"] == arrow
            assert operation["responses"]["200"]["content"] == arrow


@pytest.mark.parametrize(("name", "example"), [("JobRequest", JOB_BODY), ("Job", JOB)])
def test_the_examples_of_the_contract_fit(document: dict[str, Any], name: str, example: str) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    Draft202012Validator(schema).validate(json.loads(example))


def test_what_the_server_answers_fits(document: dict[str, Any], server: Any, finished: dict[str, Any]) -> None:
    def check(name: str, answer: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        Draft202012Validator(schema).validate(answer)

    links = finished["links"]
    check("Job", finished)
    check("JobPage", server.client.get("/v1/jobs").json())
    check("Report", server.client.get(links["report"]).json())
    check("ArtifactPage", server.client.get(links["artifacts"]).json())
    check("EventPage", server.client.get(links["events"], headers={"Accept": "application/json"}).json())
    check("Plan", server.client.post("/v1/plans", json=finished["request"]).json())
    check("Problem", server.client.get("/nothing").json())
    check("Readiness", server.client.get("/readyz").json())
    for kind, name in (("profiles", "ProfileList"), ("schemes", "SchemeList"), ("formats", "FormatList")):
        check(name, server.client.get(f"/v1/{kind}").json())
    assert server.client.get("/openapi.json").json() == document
