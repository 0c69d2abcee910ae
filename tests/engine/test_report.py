"""Reports: figures, round trip, tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from service.engine.report import RunReport
from service.errors import NotFound
from tests.engine.helpers import normal, run, save, specs


@pytest.fixture
def report(tmp_path: Path) -> RunReport:
    tensors = {f"layers.{i}.weight": normal(64, 128, seed=i) * (i + 1) for i in range(12)}
    source = save(tmp_path / "m.safetensors", tensors | {"norm.weight": normal(64)})
    return run(source, tmp_path / "work", specs("compressed-tensors", "parquet"))


def test_a_report_survives_json(report: RunReport) -> None:
    data = json.loads(json.dumps(report.to_json()))
    assert RunReport.from_json(data).to_json() == data
    assert RunReport.from_json(data).result() == report.result()


def test_the_result_has_the_figures_of_the_contract(report: RunReport) -> None:
    result = report.result()
    files = sum(f.size_bytes for f in report.outputs[0].files)
    assert result["quantized_bytes"] == files
    assert result["compression_ratio"] == pytest.approx(result["original_bytes"] / files)
    assert result["passed"] is True
    assert result["bit_width"] == 4
    assert 4 < result["bits_per_weight"] < 4.5
    assert [o["name"] for o in result["outputs"]] == ["compressed-tensors", "parquet"]


def test_the_result_shows_the_first_warnings_and_counts_all(report: RunReport) -> None:
    assert (report.result()["warnings"], report.result()["warnings_total"]) == ([], 0)
    many = tuple(f"layers.{i}.weight: int3 instead" for i in range(4000))
    warned = replace(report, warnings=many)
    assert warned.result()["warnings"] == list(many[:20])
    assert warned.result()["warnings_total"] == 4000
    assert len(json.dumps(warned.result())) < 10_000
    assert warned.to_json()["warnings"] == list(many)


def test_the_figures_of_a_model_weigh_every_weight_alike(report: RunReport) -> None:
    output = report.outputs[0]
    sums = [t.sums for t in output.tensors if t.sums]
    assert output.sums.sum_dd == pytest.approx(sum(s.sum_dd for s in sums))
    assert output.quality.cosine_similarity != pytest.approx(
        sum(s.cosine_similarity for s in sums) / len(sums), abs=1e-9
    )


def test_the_worst_ten_come_first_worst(report: RunReport) -> None:
    worst = [q.cosine_similarity for t in report.outputs[0].worst if (q := t.quality)]
    assert len(worst) == 10
    assert worst == sorted(worst)


def test_the_table_has_a_row_for_each_tensor_of_each_output(report: RunReport) -> None:
    assert report.table().num_rows == 26
    table = report.table("parquet")
    assert table.num_rows == 13
    assert table.column("scheme").to_pylist().count("none") == 1
    with pytest.raises(NotFound, match="parquet"):
        report.table("nothing")
