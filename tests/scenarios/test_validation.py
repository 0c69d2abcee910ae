"""Two stored models are compared by reading both back: the figures are those of the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.engine.helpers import save_folder
from tests.scenarios.conftest import NewModel, Weights
from tests.scenarios.readers import cosine
from tests.server import Json, Server, body, validation

FIGURES = ("cosine_similarity", "sqnr_db", "relative_error", "max_abs_error")


def by_tensor(report: Json) -> dict[str, dict[str, float]]:
    """The figures of each quantized tensor."""
    tensors = report["tensors"]
    return {t["name"]: {k: t[k] for k in FIGURES} for t in tensors if "cosine_similarity" in t}


@pytest.mark.parametrize("format_", ["compressed-tensors", "parquet"])
def test_validating_an_output_gives_the_figures_that_quantizing_reported(
    server: Server, new_model: NewModel, weights: Weights, format_: str
) -> None:
    tensors = {f"l.{i}.weight": weights(80, 256) for i in range(4)} | {"norm.weight": weights(256)}
    model = new_model(tensors)
    made = server.run(body(model, format_, bit_width=4))
    checked = server.run(validation(model, {"type": "job", "job_id": made["id"]}))
    assert checked["kind"] == "validate"
    assert checked["result"]["passed"]
    for figure in FIGURES:
        assert checked["result"][figure] == pytest.approx(made["result"][figure], rel=1e-5), figure
    reported, measured = (by_tensor(server.report(job["id"])["outputs"][0]) for job in (made, checked))
    assert measured.keys() == reported.keys()
    for name, figures in reported.items():
        assert measured[name] == pytest.approx(figures, rel=1e-5), name


def test_an_output_at_an_address_can_be_validated_by_it(server: Server, new_model: NewModel, place: Path) -> None:
    model, target = new_model(), place / "quantized"
    made = server.run(body(model, {"format": "compressed-tensors", "uri": target.as_uri()}, bit_width=8))
    by_address = server.run(validation(model, target))
    by_job = server.run(validation(model, {"type": "job", "job_id": made["id"], "output": "compressed-tensors"}))
    assert by_address["result"]["sqnr_db"] == by_job["result"]["sqnr_db"]


def test_a_model_is_equal_to_itself(server: Server, new_model: NewModel) -> None:
    model = new_model()
    job = server.run(validation(model, model))
    assert job["result"]["passed"]
    assert job["result"]["max_abs_error"] == 0
    assert "sqnr_db" not in job["result"], "nothing was lost"
    assert server.artifacts(job["id"]) == []


def test_two_plain_models_of_different_dtypes_can_be_compared(server: Server, place: Path, weights: Weights) -> None:
    wide = {f"l.{i}.weight": weights(64, 128) for i in range(3)}
    narrow = {name: x.astype(np.float16) for name, x in wide.items()}
    job = server.run(validation(save_folder(place / "f32", wide), save_folder(place / "f16", narrow)))
    tensors = {t["name"]: t for t in server.report(job["id"])["outputs"][0]["tensors"]}
    for name, x in wide.items():
        assert tensors[name]["cosine_similarity"] == pytest.approx(cosine(x, narrow[name]), abs=1e-9)
        assert tensors[name]["max_abs_error"] == pytest.approx(np.abs(x - narrow[name].astype(np.float32)).max())
    assert job["result"]["sqnr_db"] > 60


def test_a_model_with_other_tensors_is_another_model(server: Server, new_model: NewModel, weights: Weights) -> None:
    tensors = {f"l.{i}.weight": weights(64, 128) for i in range(3)}
    model = new_model(tensors)
    lacking = new_model({k: x for k, x in tensors.items() if k != "l.1.weight"})
    more = new_model(tensors | {"extra.weight": weights(8, 8)})
    turned = new_model(tensors | {"l.2.weight": weights(128, 64)})
    for other, name in ((lacking, "l.1.weight"), (more, "extra.weight"), (turned, "l.2.weight")):
        problem = server.fail(validation(model, other))
        assert (problem["code"], problem["tensor"]) == ("models_differ", name)
        assert name in problem["detail"]


def test_a_model_that_is_too_far_off_is_reported_and_not_an_error(
    server: Server, new_model: NewModel, weights: Weights
) -> None:
    tensors = {f"l.{i}.weight": weights(64, 128) for i in range(3)}
    off = tensors | {"l.1.weight": weights(64, 128)}
    job = server.run(validation(new_model(tensors), new_model(off), min_accuracy=0.9))
    assert job["result"]["passed"] is False
    assert server.report(job["id"])["outputs"][0]["worst_tensors"][0] == "l.1.weight"


def test_copies_that_differ_are_told(server: Server, new_model: NewModel, weights: Weights) -> None:
    tensors = {"l.weight": weights(64, 128), "ids": np.arange(5000).reshape(50, 100)}
    other = tensors | {"ids": tensors["ids"] + 1}
    job = server.run(validation(new_model(tensors), new_model(other)))
    assert [w for w in job["result"]["warnings"] if w.startswith("ids")], job["result"]
    assert [e["tensor"] for e in server.follow(job["id"]) if e["type"] == "job.warning"] == ["ids"]


def test_a_nan_in_either_model_fails_the_validation(server: Server, new_model: NewModel, weights: Weights) -> None:
    tensors = {"l.weight": weights(64, 128)}
    sick = {"l.weight": tensors["l.weight"].copy()}
    sick["l.weight"][3, 3] = np.nan
    good_model, sick_model = new_model(tensors), new_model(sick)
    for original, other in ((good_model, sick_model), (sick_model, good_model)):
        problem = server.fail(validation(original, other))
        assert (problem["code"], problem["tensor"]) == ("non_finite_weights", "l.weight")


def test_each_output_of_a_job_can_be_validated_by_its_name(server: Server, new_model: NewModel) -> None:
    made = server.run(body(new_model(), "parquet", "compressed-tensors"))
    for output in ("parquet", "compressed-tensors"):
        source = {"type": "job", "job_id": made["id"], "output": output}
        assert server.run(validation(made["request"]["source"], source))["result"]["passed"]
    missing = {"type": "job", "job_id": made["id"], "output": "gone"}
    response = server.client.post("/v1/jobs", json=validation(made["request"]["source"], missing))
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (404, "/quantized/output")
