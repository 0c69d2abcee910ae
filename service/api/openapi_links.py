"""OpenAPI links: which part of an answer names what another call takes, for generators and for those who explore."""

from __future__ import annotations

from typing import Any

_OF_JOB = ("get_job", "cancel_job", "stream_job_events", "get_job_report", "list_job_artifacts", "download_job_archive")
_OF_BATCH = ("get_batch", "cancel_batch", "stream_batch_events")

#: By operation and status: the calls that follow, and their parameters as runtime expressions.
LINKS: dict[tuple[str, str], list[tuple[str, dict[str, str]]]] = {
    ("create_job", "202"): [(name, {"job_id": "$response.body#/id"}) for name in _OF_JOB],
    ("create_batch", "202"): [(name, {"batch_id": "$response.body#/id"}) for name in _OF_BATCH],
    ("list_job_artifacts", "200"): [
        ("download_job_artifact", {"job_id": "$request.path.job_id", "path": "$response.body#/data/0/path"})
    ],
    ("upload_blob", "201"): [("check_blob", {"digest": "$request.path.digest"})],
    ("upload_blob", "202"): [("check_blob", {"digest": "$request.path.digest"})],
}


def add_links(operation: dict[str, Any]) -> None:
    """Put the links of an operation into its answers."""
    for status, answer in operation["responses"].items():
        for name, parameters in LINKS.get((operation["operationId"], status), []):
            answer.setdefault("links", {})[name] = {"operationId": name, "parameters": parameters}
