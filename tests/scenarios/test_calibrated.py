"""Jobs with calibration: uploaded or at an address, in the plan, the run, the report and the errors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tests.engine.calibrations import gram, samples, save_parquet, save_safetensors
from tests.scenarios.conftest import NewModel, Weights
from tests.scenarios.readers import read_parquet
from tests.server import Json, Server, body, uri, validation

FED = {"blocks.a": samples(400, 192, seed=3), "blocks.b": samples(400, 96, seed=4)}
LOW = {"bit_width": 3, "group_size": 32, "min_accuracy": 0.5}


@pytest.fixture
def tensors(weights: Weights) -> dict[str, np.ndarray]:
    return {f"{name}.weight": weights(64, fed.shape[1]) for name, fed in FED.items()}


def calibrated(model: Path, calibration: Path | Json, **config: object) -> Json:
    """A job on `parquet`."""
    given = uri(calibration) if isinstance(calibration, Path) else calibration
    return body(model, "parquet", **(LOW | config)) | {"calibration": given}


def output_errors(tensors: dict[str, np.ndarray], stored: dict[str, np.ndarray]) -> dict[str, float]:
    """Of each layer, by running it as it was and as it is stored."""
    errors = {}
    for name, fed in FED.items():
        before, after = (fed.astype(np.float64) @ w[f"{name}.weight"].astype(np.float64).T for w in (tensors, stored))
        errors[f"{name}.weight"] = float(np.linalg.norm(after - before) / np.linalg.norm(before))
    return errors


def test_a_calibrated_job_reports_what_its_layers_put_out_and_loses_less_of_it(
    server: Server, new_model: NewModel, place: Path, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    model = new_model(tensors)
    grams = save_safetensors(place / "grams.safetensors", {f"{name}.gram": gram(fed) for name, fed in FED.items()})
    totals = []
    for method in ("minmax", "mse", "auto"):
        job = server.run(calibrated(model, grams, method=method))
        [output] = server.report(job["id"])["outputs"]
        stored = read_parquet(server.download(job["id"], tmp_path / method) / "parquet")
        measured = {t["name"]: t["output_relative_error"] for t in output["tensors"]}
        assert measured == pytest.approx(output_errors(tensors, stored), rel=1e-3)
        cosines = {t["name"]: t["output_cosine_similarity"] for t in output["tensors"]}
        assert output["worst_tensors"] == sorted(cosines, key=cosines.__getitem__)
        assert job["result"]["output_relative_error"] == output["output_relative_error"]
        totals.append(output["output_relative_error"])
    assert {t["method"] for t in output["tensors"]} == {"gptq"}
    assert all("auto: gptq, for there is a Gram matrix" in t["rule"] for t in output["tensors"])
    assert totals[2] < 0.9 * totals[1] < 0.9 * 0.98 * totals[0]
    completed = [event["name"] for event in server.follow(job["id"]) if event["type"] == "tensor.completed"]
    assert completed == list(measured)


def test_raw_samples_in_parquet_are_uploaded_and_calibrate_by_timestep(
    server: Server, new_model: NewModel, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    entries = {"timesteps": np.arange(4) * 250}
    for name, fed in FED.items():
        entries |= {f"{name}.samples": fed, f"{name}.sample_timestep": np.arange(len(fed)) % 4 * 250}
    path = save_parquet(tmp_path / "samples.parquet", entries)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert server.client.put(f"/v1/blobs/sha256:{digest}", content=path.read_bytes()).status_code == 201
    source = {"type": "blobs", "files": {"samples.parquet": f"sha256:{digest}"}}
    model, errors = new_model(tensors), {}
    for weights in ("uniform", "snr_cosine", [0, 0, 0, 1.0]):
        asked = calibrated(model, source, method="mse", timestep_weights=weights, calibration_samples=50)
        job = server.run(asked)
        [output] = server.report(job["id"])["outputs"]
        assert all("weighted by the mean square" in t["rule"] for t in output["tensors"])
        errors[str(weights)] = output["output_relative_error"]
    assert len(set(errors.values())) == 3


def test_a_plan_says_which_method_each_layer_gets_and_why(
    server: Server, new_model: NewModel, place: Path, tensors: dict[str, np.ndarray]
) -> None:
    partial = save_safetensors(
        place / "partial.safetensors", {"blocks.a.mean_square": (FED["blocks.a"] ** 2).mean(0)[None]}
    )
    asked = calibrated(new_model(tensors), partial, method="gptq")
    plan = server.client.post("/v1/plans", json=asked).json()
    rows = {row["name"]: row for row in plan["outputs"][0]["tensors"]}
    assert {row["method"] for row in rows.values()} == {"mse"}
    assert "mse instead, weighted by the mean square" in rows["blocks.a.weight"]["rule"]
    assert "mse instead, for there is no calibration of it" in rows["blocks.b.weight"]["rule"]
    job = server.run(asked)
    warned = [event for event in server.follow(job["id"]) if event["type"] == "job.warning"]
    assert [(event["code"], event["tensor"]) for event in warned] == [
        ("calibration_missing", "blocks.a.weight"),
        ("calibration_missing", "blocks.b.weight"),
    ]


def test_jobs_of_a_batch_have_their_calibrations(
    server: Server, new_model: NewModel, place: Path, tensors: dict[str, np.ndarray]
) -> None:
    grams = save_safetensors(place / "grams.safetensors", {f"{name}.gram": gram(fed) for name, fed in FED.items()})
    model = new_model(tensors)
    items = [calibrated(model, grams, method="gptq"), body(model, "parquet", **LOW, method="mse")]
    batch = server.client.post("/v1/batches", json={"items": items}).json()
    results = [server.finish(job_id)["result"] for job_id in batch["job_ids"]]
    assert ["output_relative_error" in result for result in results] == [True, False]


def test_a_validation_with_calibration_finds_the_outputs_that_the_job_reported(
    server: Server, new_model: NewModel, place: Path, tensors: dict[str, np.ndarray]
) -> None:
    model = new_model(tensors)
    grams = save_safetensors(place / "grams.safetensors", {f"{name}.gram": gram(fed) for name, fed in FED.items()})
    job = server.run(calibrated(model, grams, method="gptq"))
    stored = {"type": "job", "job_id": job["id"]}
    plain, fed = (server.run(validation(model, stored) | given) for given in ({}, {"calibration": uri(grams)}))
    assert "output_relative_error" not in plain["result"]
    for name in ("output_relative_error", "output_cosine_similarity", "relative_error"):
        assert fed["result"][name] == pytest.approx(job["result"][name], rel=1e-4)
    between = (fed["result"]["cosine_similarity"] + fed["result"]["output_cosine_similarity"]) / 2
    passed = {
        key: server.run(validation(model, stored, min_accuracy=between) | given)["result"]["passed"]
        for key, given in (("plain", {}), ("fed", {"calibration": uri(grams)}))
    }
    assert passed == {"plain": False, "fed": True}


def test_what_is_wrong_with_a_calibration_is_told_before_the_job_begins(
    server: Server, new_model: NewModel, place: Path, tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    model, eye = new_model(tensors), np.eye(96, dtype=np.float32)
    other = save_safetensors(place / "other.safetensors", {"blocks.a.gram": eye})
    outside = save_safetensors(tmp_path / "outside.safetensors", {"blocks.b.gram": eye})
    (place / "damaged.gguf").write_bytes(b"GGUF and nothing else")
    for asked, code, pointer in (
        (calibrated(model, other), "invalid_calibration", "/calibration"),
        (calibrated(model, place / "damaged.gguf"), "corrupt_model", "/calibration/uri"),
        (calibrated(model, place / "nothing.safetensors"), "model_not_found", "/calibration/uri"),
        (calibrated(model, outside), "path_forbidden", "/calibration/uri"),
        (calibrated(model, model / "config.json"), "invalid_calibration", "/calibration/uri"),
        (body(model, "parquet", method="gptq"), "invalid_config", "/config/method"),
    ):
        answer = server.client.post("/v1/jobs", json=asked)
        problem = answer.json()
        assert (answer.status_code in (403, 404, 422), problem["code"]) == (True, code), problem
        assert problem["errors"][0]["pointer"] == pointer
    named = server.client.post("/v1/jobs", json=calibrated(model, other)).json()["detail"]
    assert "blocks.a.gram has the shape [96, 96]" in named
    assert "blocks.a.weight of shape [64, 192]" in named


def test_numbers_that_cannot_be_fail_the_job_with_the_layer(
    server: Server, new_model: NewModel, place: Path, tensors: dict[str, np.ndarray]
) -> None:
    broken = gram(FED["blocks.b"])
    broken[5, 7] = np.nan
    path = save_safetensors(place / "broken.safetensors", {"blocks.b.gram": broken})
    problem = server.fail(calibrated(new_model(tensors), path))
    assert (problem["code"], problem["tensor"]) == ("invalid_calibration", "blocks.b.weight")
    assert "blocks.b.gram" in problem["detail"]
