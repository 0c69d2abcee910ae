"""Plans: what a job would do, said beforehand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.api.schemas.results import Plan
from tests.engine.helpers import normal, save
from tests.server import Server, body


def test_a_plan_says_what_becomes_of_each_tensor_and_writes_nothing(server: Server, model: Path) -> None:
    before = sorted(p for p in server.data_dir.rglob("*") if p.is_dir())
    asked = body(model, "parquet", "compressed-tensors", layers=[{"match": "blocks.0.*", "bit_width": 8}])
    response = server.client.post("/v1/plans", json=asked)
    assert response.status_code == 200, response.text
    plan = Plan.model_validate_json(response.content)
    assert [o.name for o in plan.outputs] == ["parquet", "compressed-tensors"]
    schemes = {t.name: t.scheme for t in plan.outputs[0].tensors}
    assert schemes == {f"blocks.{i}.weight": "int8" if i == 0 else "int4" for i in range(6)}
    assert plan.predicted.seconds > 0
    assert plan.outputs[0].predicted_bytes < plan.source_bytes
    assert sorted(p for p in server.data_dir.rglob("*") if p.is_dir()) == before


def test_a_plan_is_refused_as_the_job_would_be(server: Server, model: Path, model_root: Path) -> None:
    def code(asked: object) -> tuple[int, str]:
        response = server.client.post("/v1/plans", json=asked)
        return response.status_code, response.json()["code"]

    assert code(body(model_root / "none", "parquet")) == (404, "model_not_found")
    assert code(body(Path("/etc"), "parquet")) == (403, "path_forbidden")
    assert code(body(model, "vhs"))[0] == 422
    assert code({"kind": "validate"}) == (422, "invalid_request")


def test_a_width_that_is_chosen_stays_within_its_target_in_plan_and_job(server: Server, model: Path) -> None:
    asked = body(model, "parquet", bit_width="auto", target_bits_per_weight=3.5, min_accuracy=0.0)
    response = server.client.post("/v1/plans", json=asked)
    assert response.status_code == 200, response.text
    [planned] = Plan.model_validate_json(response.content).outputs
    assert planned.budget is not None
    assert 3.0 < planned.budget.chosen.bits_per_weight <= 3.5
    assert len(planned.budget.curve) > 5
    job_id = server.submit(asked)["id"]
    told = [e["progress"] for e in server.follow(job_id) if e["type"] == "job.progress"]
    [output] = server.report(job_id)["outputs"]
    assert output["budget"] == planned.budget.model_dump()
    assert output["bits_per_weight"] == planned.budget.chosen.bits_per_weight
    assert {t["name"]: t["scheme"] for t in output["tensors"]} == {t.name: t.scheme for t in planned.tensors}
    fractions = [progress["fraction"] for progress in told]
    assert fractions == sorted(fractions)


def test_a_target_that_cannot_be_reached_fails_the_plan_with_what_can(server: Server, model: Path) -> None:
    asked = body(model, "parquet", bit_width="auto", target_bits_per_weight=1.0)
    response = server.client.post("/v1/plans", json=asked)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_config")
    assert "bits per weight is the least" in response.json()["detail"]


def test_one_plan_measures_weights_at_a_time_and_others_go_on(server: Server, model_root: Path, model: Path) -> None:
    slow = save(model_root / "slow" / "model.safetensors", {"a.weight": normal(384, 1024)})
    asked = body(slow, "parquet", bit_width="auto", target_bits_per_weight=4.0, backend="reference")
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(server.client.post, "/v1/plans", json=asked) for _ in range(2)]
        assert server.client.post("/v1/plans", json=body(model, "parquet")).status_code == 200
        answers = sorted((future.result() for future in both), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [200, 429]
    assert answers[1].json()["code"] == "queue_full"
    assert int(answers[1].headers["retry-after"]) > 0
