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


def test_linked_files_are_listed_for_whoever_checks_links_and_linked_folders_are_not_entered(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    fill(outside, "secret.json")
    folder = model(tmp_path / "m")
    (folder / "link.json").symlink_to(outside / "secret.json")
    (folder / "linked").symlink_to(outside)
    reader = open_model(folder)
    assert folder / "link.json" in reader.files
    assert folder / "link.json" in set(files_under(folder))
    assert not any(p.name == "secret.json" for p in [*files_under(folder), *reader.files])


def test_files_under_an_index_are_the_weights_beside_it(tmp_path: Path) -> None:
    fill(tmp_path, "m.safetensors.index.json", "m-1.safetensors", "other.txt")
    names = [p.name for p in files_under(tmp_path / "m.safetensors.index.json")]
    assert names == ["m.safetensors.index.json", "m-1.safetensors"]


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
