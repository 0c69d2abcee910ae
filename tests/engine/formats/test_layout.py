"""What belongs to a model folder, and what kind of model it is."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from service.engine.formats.layout import files_under
from service.engine.formats.modality import find_modality
from service.engine.formats.registry import find_format, formats, open_model
from service.errors import (
    AlreadyQuantized,
    CorruptModel,
    InvalidConfig,
    ModelNotFound,
    PickledWeights,
    UnsupportedModel,
)
from tests.engine.formats.outputs import normal
from tests.engine.formats.test_safetensors import save


def fill(folder: Path, *names: str) -> None:
    """Files with some bytes."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def model(folder: Path, name: str = "model.safetensors", **config: Any) -> Path:
    """A folder with weights and a config."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save(folder / name, {"w.weight": normal(4, 4)})
    ((folder / name).parent / "config.json").write_text(json.dumps(config))
    return folder


def test_companions_are_all_other_files_but_hidden_ones_and_other_weights(tmp_path: Path) -> None:
    model(tmp_path, model_type="bert")
    fill(tmp_path, "tokenizer.json", "1_Pooling/config.json", "pytorch_model.bin", "onnx/model.onnx", ".gitattributes",
         ".git/HEAD", "sub/.cache/x", "tf_model.h5", "vocab.txt")  # fmt: skip
    layout = open_model(tmp_path).layout
    assert [str(c) for c in layout.companions] == [
        "config.json",
        "tokenizer.json",
        "vocab.txt",
        "1_Pooling/config.json",
    ]
    assert layout.config == {"model_type": "bert"}
    assert (layout.stem, layout.weights_dir) == ("model", PurePosixPath("."))
    for skipped in ("pytorch_model.bin", "onnx/model.onnx", "tf_model.h5"):
        assert any(skipped in warning for warning in layout.warnings)


def test_of_a_pipeline_the_denoiser_is_read_and_the_rest_goes_along(tmp_path: Path) -> None:
    fill(tmp_path, "model_index.json", "scheduler/scheduler_config.json")
    model(tmp_path, "vae/diffusion_pytorch_model.safetensors")
    model(tmp_path, "transformer/diffusion_pytorch_model.safetensors", _class_name="FluxTransformer2DModel")
    layout = open_model(tmp_path).layout
    assert layout.weights_dir == PurePosixPath("transformer")
    assert layout.stem == "diffusion_pytorch_model"
    companions = {str(c) for c in layout.companions}
    assert "vae/diffusion_pytorch_model.safetensors" in companions
    assert {"model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"} <= companions
    assert (layout.modality, layout.is_diffusion, layout.modality_from) == ("image", True, "config.json")


def test_a_pipeline_with_a_unet_reads_that(tmp_path: Path) -> None:
    fill(tmp_path, "model_index.json")
    model(tmp_path, "unet/diffusion_pytorch_model.safetensors", _class_name="UNet2DConditionModel")
    assert open_model(tmp_path).layout.weights_dir == PurePosixPath("unet")


def test_two_copies_have_one_fingerprint_and_another_shape_another(tmp_path: Path) -> None:
    first, second = model(tmp_path / "a"), model(tmp_path / "b")
    save(tmp_path / "c.safetensors", {"w.weight": normal(4, 5)})
    prints = [open_model(p).layout.fingerprint for p in (first, second, tmp_path / "c.safetensors")]
    assert prints[0] == prints[1] != prints[2]


def test_linked_files_and_folders_go_along_under_their_own_names(tmp_path: Path) -> None:
    fill(tmp_path / "shared", "vocab.txt", "deep/merges.txt", ".hidden")
    folder = model(tmp_path / "m")
    (folder / "link.json").symlink_to(tmp_path / "shared" / "vocab.txt")
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).symlink_to(tmp_path / "shared")
    layout = (reader := open_model(folder)).layout
    names = ["config.json", "link.json"]
    names += [
        f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in ("vocab.txt", "deep/merges.txt")
    ]
    assert [str(c) for c in layout.companions] == names
    assert layout.warnings == ()
    assert (
        {*files_under(folder)}
        == {folder / n for n in reader.files}
        == {folder / n for n in (*names, "model.safetensors")}
    )


def test_links_to_folders_around_them_or_to_nothing_are_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "sub").mkdir()
    for name, target in {
        "again": folder,
        "up": tmp_path,
        "sub/back": folder,
        "gone": "nothing",
        "ring": "ring",
    }.items():
        (folder / name).symlink_to(target)
    layout = open_model(folder).layout
    assert [str(c) for c in layout.companions] == ["config.json"]
    for name in ("again", "up", "sub/back", "gone", "ring"):
        assert any(warning.startswith(f"{name} is left out") for warning in layout.warnings), name


def test_links_that_meet_again_and_again_are_not_followed_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.formats.walk.MAX_ENTRIES", 500)
    folder = model(tmp_path / "m")
    for depth in range(20):  # 2**20 ways to the last folder
        (tmp_path / f"d{depth}").mkdir()
        for name in ("one", "two"):
            (tmp_path / f"d{depth}" / name).symlink_to(tmp_path / f"d{depth + 1}")
    (tmp_path / "d20").mkdir()
    (folder / "maze").symlink_to(tmp_path / "d0")
    with pytest.raises(UnsupportedModel, match="more than 500"):
        open_model(folder)


def test_files_under_an_index_are_those_that_it_names_there_or_not(tmp_path: Path) -> None:
    fill(tmp_path, "m-1.safetensors", "other.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "sub/m-2.safetensors"}}))
    assert list(files_under(index)) == [index, tmp_path / "m-1.safetensors", tmp_path / "sub" / "m-2.safetensors"]


@pytest.mark.parametrize("folder", [".", "unet"])
@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_of_several_variants_the_one_with_the_canonical_name_is_read(tmp_path: Path, stem: str, folder: str) -> None:
    # As diffusers folders have them; the adapter has a tensor of its own, which was merged silently.
    here = tmp_path / folder
    model(here, f"{stem}.safetensors")
    fill(tmp_path, "model_index.json")
    others = [f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors", f"{stem}.fp16.safetensors.index.json",
              f"{stem}.safetensors.index.fp16.json"]  # fmt: skip
    fill(here, *others)
    save(here / "adapter_model.safetensors", {"lora.weight": normal(4, 4)})
    reader = open_model(tmp_path)
    assert ([t.name for t in reader.tensors], reader.layout.stem) == (["w.weight"], stem)
    for name in (*others, "adapter_model.safetensors"):
        assert any(name in w and "neither read nor copied" in w for w in reader.layout.warnings), name
        assert not any(c.name == name for c in reader.layout.companions)


def test_shards_with_canonical_names_are_read_without_an_index_and_variants_are_not(tmp_path: Path) -> None:
    for i in (1, 2):
        save(tmp_path / f"model-0000{i}-of-00002.safetensors", {f"w{i}.weight": normal(4, 4)})
        save(tmp_path / f"model.fp16-0000{i}-of-00002.safetensors", {f"w{i}.weight": normal(4, 4)})
    reader = open_model(tmp_path)
    assert ([t.name for t in reader.tensors], reader.layout.stem) == (["w1.weight", "w2.weight"], "model")


def test_an_index_with_a_canonical_name_comes_before_one_of_a_variant(tmp_path: Path) -> None:
    for stem in ("model", "model.fp16"):
        save(tmp_path / f"{stem}-00001-of-00001.safetensors", {f"{stem}.weight": normal(4, 4)})
        weight_map = {f"{stem}.weight": f"{stem}-00001-of-00001.safetensors"}
        (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert [t.name for t in open_model(tmp_path).tensors] == ["model.weight"]


def test_where_no_name_is_canonical_all_weights_are_one_model(tmp_path: Path) -> None:
    for stem in ("part-a", "part-b"):
        save(tmp_path / f"{stem}.safetensors", {f"{stem}.weight": normal(4, 4)})
    assert [t.name for t in open_model(tmp_path).tensors] == ["part-a.weight", "part-b.weight"]


def test_what_outputs_write_themselves_is_left_out_with_a_warning(tmp_path: Path) -> None:
    model(tmp_path)
    fill(tmp_path, "manifest.json", "sub/manifest.json", "model-00001.parquet", "data/train.parquet")
    (tmp_path / "metadata.json").write_text('{"modality": "text"}')
    layout = open_model(tmp_path).layout
    assert {str(c) for c in layout.companions} == {
        "config.json", "metadata.json", "sub/manifest.json", "data/train.parquet"}  # fmt: skip
    for name in ("manifest.json", "metadata.json", "model-00001.parquet"):
        assert any(w.startswith(name) for w in layout.warnings), name
    assert len(layout.warnings) == 3


@pytest.mark.parametrize(
    ("class_name", "pipeline", "expected"),
    [
        ("NewDenoiserModel", "NewPipeline", ("image", True, "model_index.json")),
        ("NewDenoiserModel", "CogVideoXPipeline", ("video", True, "model_index.json")),
        ("WanTransformer3DModel", "NewPipeline", ("video", True, "config.json")),
    ],
)
def test_a_pipeline_is_a_diffusion_model_whatever_its_classes_are_called(
    tmp_path: Path, class_name: str, pipeline: str, expected: tuple[str, bool, str]
) -> None:
    model(tmp_path, "transformer/diffusion_pytorch_model.safetensors", _class_name=class_name)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    layout = open_model(tmp_path).layout
    assert (layout.modality, layout.is_diffusion, layout.modality_from) == expected


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.ckpt", "x.pth"])
def test_pickled_weights_are_refused_with_how_to_convert_them(tmp_path: Path, name: str) -> None:
    fill(tmp_path, name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(PickledWeights, match="save_file"):
            open_model(path)


def test_an_empty_folder_holds_no_model(tmp_path: Path) -> None:
    fill(tmp_path, "readme.md")
    with pytest.raises(ModelNotFound):
        open_model(tmp_path)


def test_an_unknown_kind_of_file_is_refused_with_what_can_be_read(tmp_path: Path) -> None:
    fill(tmp_path, "model.gguf")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        open_model(tmp_path / "model.gguf")


def test_a_model_quantized_by_something_else_is_refused(tmp_path: Path) -> None:
    model(tmp_path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(AlreadyQuantized, match="gptq"):
        open_model(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1, "a": 2}', "\ufffe"])
def test_a_damaged_config_is_refused(tmp_path: Path, text: str) -> None:
    model(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CorruptModel, match=r"config\.json"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("stated", "config", "header", "tensors", "expected"),
    [
        ({"modality": "audio"}, {"model_type": "bert"}, {}, [], ("audio", False, "metadata.json")),
        ({"modality": "smell"}, {"model_type": "bert"}, {}, [], ("text", False, "config.json")),
        ({}, {"architectures": ["LlamaForCausalLM"]}, {}, ["down_blocks.0"], ("text", False, "config.json")),
        ({}, {"model_type": "gpt_bigcode"}, {}, [], ("code", False, "config.json")),
        ({}, {"model_type": "whisper"}, {}, [], ("audio", False, "config.json")),
        ({}, {"model_type": "vit"}, {}, [], ("image", False, "config.json")),
        ({}, {"architectures": ["HunYuanDenseV1ForCausalLM"]}, {}, [], ("text", False, "config.json")),
        ({}, {"_class_name": "WanTransformer3DModel"}, {}, [], ("video", True, "config.json")),
        ({}, {"_class_name": "SD3Transformer2DModel"}, {}, [], ("image", True, "config.json")),
        ({}, {"model_type": "DiT"}, {}, [], ("image", True, "config.json")),
        ({}, {}, {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, [], ("image", True, "header")),
        ({}, {}, {}, ["double_blocks.0.img_attn.qkv.weight"], ("image", True, "tensor names")),
        ({}, {}, {}, ["temporal_transformer.x"], ("video", True, "tensor names")),
        ({}, {"model_type": 3, "architectures": "x"}, {}, ["w"], ("text", False, "default")),
    ],
)  # fmt: skip
def test_the_first_source_that_knows_decides_the_modality(
    stated: Any, config: Any, header: Any, tensors: Any, expected: Any
) -> None:
    found = find_modality(stated, config, header, tensors)
    assert (found.name, found.is_diffusion, found.found_in) == expected


def test_formats_are_found_by_their_ids_and_an_unknown_one_is_named() -> None:
    assert set(formats()) == {"safetensors", "compressed-tensors", "parquet"}
    with pytest.raises(InvalidConfig, match="'zip' does not exist") as caught:
        find_format("zip", pointer="/outputs/0/format")
    assert caught.value.pointer == "/outputs/0/format"
