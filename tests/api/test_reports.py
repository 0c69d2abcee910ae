"""The report in its four forms."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.api.schemas.results import Report
from tests.server import Server

PARQUET = "application/vnd.apache.parquet"
ARROW = "application/vnd.apache.arrow.stream"


def test_the_report_has_the_form_that_the_document_promises(server: Server, finished: dict[str, Any]) -> None:
    response = server.client.get(finished["links"]["report"])
    assert response.headers["content-type"] == "application/json"
    report = Report.model_validate_json(response.content)
    assert [o.name for o in report.outputs] == ["compressed-tensors", "parquet"]
    assert len(report.outputs[0].tensors) == 6
    assert "null" not in response.text


@pytest.mark.parametrize("media_type", [PARQUET, ARROW])
def test_the_table_comes_as_asked_for(server: Server, finished: dict[str, Any], media_type: str) -> None:
    response = server.client.get(finished["links"]["report"], headers={"Accept": f"{media_type}, text/html;q=0.5"})
    assert response.headers["content-type"] == media_type
    assert response.headers["vary"] == "Accept"
    source = io.BytesIO(response.content)
    table = pq.read_table(source) if media_type == PARQUET else pa.ipc.open_stream(source).read_all()
    assert table.num_rows == 12
    assert set(table["output"].to_pylist()) == {"compressed-tensors", "parquet"}
    assert {"name", "scheme", "cosine_similarity", "sqnr_db", "stored_bytes"} <= set(table.column_names)


def test_the_table_of_one_output(server: Server, finished: dict[str, Any]) -> None:
    address, headers = finished["links"]["report"], {"Accept": PARQUET}
    response = server.client.get(address, params={"output": "parquet"}, headers=headers)
    assert pq.read_table(io.BytesIO(response.content))["output"].to_pylist() == ["parquet"] * 6
    assert server.client.get(address, params={"output": "none"}, headers=headers).status_code == 404


def test_each_form_has_its_own_entity_tag(server: Server, finished: dict[str, Any]) -> None:
    tags = set()
    for media_type in ("application/json", "text/html", PARQUET, ARROW):
        headers = {"Accept": media_type}
        etag = server.client.get(finished["links"]["report"], headers=headers).headers["etag"]
        again = server.client.get(finished["links"]["report"], headers=headers | {"If-None-Match": etag})
        assert again.status_code == 304
        tags.add(etag)
    assert len(tags) == 4


@pytest.mark.parametrize(
    ("accept", "answered"),
    [
        ("*/*", "application/json"),
        ("application/*;q=0.2, application/json;q=0.1", PARQUET),
        (f"application/json;q=0.5, {PARQUET}", PARQUET),
        (f"{ARROW};q=0, */*;q=0.1", "application/json"),
    ],
)
def test_the_client_chooses_by_quality(server: Server, finished: dict[str, Any], accept: str, answered: str) -> None:
    response = server.client.get(finished["links"]["report"], headers={"Accept": accept})
    assert response.headers["content-type"] == answered


def test_another_form_is_not_acceptable(server: Server, finished: dict[str, Any]) -> None:
    response = server.client.get(finished["links"]["report"], headers={"Accept": "text/csv"})
    assert (response.status_code, response.json()["code"]) == (406, "not_acceptable")
    assert PARQUET in response.json()["detail"]


def test_a_browser_gets_a_page_that_needs_nothing_else(server: Server, finished: dict[str, Any]) -> None:
    accept = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    response = server.client.get(finished["links"]["report"], headers={"Accept": accept})
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src" not in response.headers["content-security-policy"]
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    assert response.text.count("blocks.3.weight: int4") == 4  # a bar of error and one of bits in each output
