"""The library compressed-tensors decompresses the small floats that we write to just the weights that we read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine.formats.compressed_tensors_config import FLOAT_PACKINGS
from service.engine.formats.registry import find_format, open_model
from service.engine.methods.minmax import MinMax
from service.engine.schemes.base import Scheme
from service.engine.schemes.microscaling import Mx
from service.engine.schemes.registry import build_scheme
from service.errors import ArrowQuantError, CorruptModel, UnsupportedModel
from tests.engine.formats.outputs import Item, Output, all_float_schemes, label, normal

torch = pytest.importorskip("torch", reason="the extra `peers` is not installed")
compressed_tensors = pytest.importorskip("compressed_tensors", reason="the extra `peers` is not installed")
load_file = pytest.importorskip("safetensors.torch").load_file

SCHEMES = [scheme for scheme in all_float_schemes() if scheme.id in FLOAT_PACKINGS]
SHAPES = ((64, 128), (1, 256), (300, 384))


def write(folder: Path, items: list[Item]) -> Path:
    """A model folder."""
    Output(folder, find_format("compressed-tensors"), items).run()
    return folder


def groups_of(folder: Path) -> dict[str, Any]:
    """The groups of its configuration, as the library parses them."""
    from compressed_tensors.quantization import QuantizationConfig

    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    return dict(QuantizationConfig.model_validate(written).config_groups)


def decompressed(folder: Path, module: str, group: Any) -> np.ndarray:
    """A weight by the library, as float32."""
    from compressed_tensors.compressors import BaseCompressor

    parts = load_file(folder / "model.safetensors")
    state = {name.removeprefix(f"{module}."): part for name, part in parts.items() if name.startswith(f"{module}.")}
    compressor = BaseCompressor.get_value_from_registry(group.format)
    return np.asarray(compressor.decompress(state, group)["weight"].float().numpy())


def ours(folder: Path, name: str) -> np.ndarray:
    """The weight as this service reads it."""
    reader = open_model(folder)
    info = reader.find(name)
    assert info is not None
    read = np.asarray(reader.rows(info, 0, info.rows))
    reader.close()
    return read


def in_bfloat16(x: np.ndarray) -> np.ndarray:
    """As the library gives out numbers of 4 bits."""
    return np.asarray(torch.from_numpy(x).bfloat16().float().numpy())


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
def test_the_decompressor_gives_exactly_the_weights_that_we_read(tmp_path: Path, scheme: Scheme) -> None:
    items = [Item(f"l{i}.weight", normal(*shape, seed=i), scheme) for i, shape in enumerate(SHAPES)]
    folder = write(tmp_path, [*items, Item("head.weight", normal(4, 64))])
    (group,) = groups_of(folder).values()
    assert group.format == FLOAT_PACKINGS[scheme.id]
    for i, shape in enumerate(SHAPES):
        theirs, mine = decompressed(folder, f"l{i}", group), ours(folder, f"l{i}.weight")
        assert theirs.shape == shape
        # Of 8 bits with powers of two as well: it makes those bfloat16.
        rounded = in_bfloat16(mine) if scheme.bits == 4 or isinstance(scheme, Mx) else mine
        np.testing.assert_array_equal(theirs, rounded)


@pytest.mark.parametrize("id_", ["mxfp4", "nvfp4"])
def test_each_nibble_is_where_the_library_looks_for_it(tmp_path: Path, id_: str) -> None:
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values += [-value for value in values]
    x = np.zeros((32, 128), np.float32)
    for row in range(32):
        x[row, 96 + row % 15] = values[row // 2]
    x[:, 15::16] = 6.0  # which gives each group a scale of 1
    folder = write(tmp_path, [Item("x.weight", x, build_scheme(id_, symmetric=True))])
    (group,) = groups_of(folder).values()
    theirs = decompressed(folder, "x", group)
    np.testing.assert_array_equal(theirs, in_bfloat16(ours(folder, "x.weight")))
    np.testing.assert_array_equal(theirs, x)
    packed = load_file(folder / "model.safetensors")["x.weight_packed"].numpy()
    for row in range(32):
        column = 96 + row % 15
        code = (packed[row, column // 2] >> (4 if column % 2 else 0)) & 0xF
        assert code & 7 == row // 2 % 8


def test_groups_of_several_formats_reach_the_layers_they_were_written_for(tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    schemes = [*SCHEMES, build_scheme("int4", symmetric=True, group_size=32)]
    items = [Item(f"l{i}.weight", normal(256, 128, seed=i), scheme) for i, scheme in enumerate(schemes)]
    folder = write(tmp_path, items)
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert written["format"] == "mixed-precision"
    model = torch.nn.ModuleDict({f"l{i}": torch.nn.Linear(128, 256) for i in range(len(schemes))})
    apply_quantization_config(model, QuantizationConfig.model_validate(written), show_progress=False)
    for i, scheme in enumerate(schemes):
        group = model[f"l{i}"].quantization_scheme
        assert group.weights.num_bits == scheme.bits
        expected = ours(folder, f"l{i}.weight")
        np.testing.assert_allclose(decompressed(folder, f"l{i}", group), expected, rtol=2.0**-8)


@pytest.mark.parametrize("bits", [4, 8])
def test_powers_of_two_are_those_of_the_library(bits: int, rng: np.random.Generator) -> None:
    from compressed_tensors.quantization.utils import mxfp_utils

    x = np.exp2(rng.uniform(-40, 40, (20_000, 32))).astype(np.float32)
    scale, _ = MinMax().find(np, x, Mx(bits=bits))
    exponents = mxfp_utils.generate_mx_scales(torch.from_numpy(x.max(axis=-1)), bits).numpy() - 127
    np.testing.assert_array_equal(np.log2(scale), exponents)


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
def test_what_the_library_compresses_is_read(tmp_path: Path, scheme: Scheme) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from safetensors.torch import save_file

    folder = write(tmp_path / "ours", [Item("x.weight", normal(256, 128), scheme)])
    (group,) = groups_of(folder).values()
    compressor = BaseCompressor.get_value_from_registry(group.format)
    parts = load_file(folder / "model.safetensors")
    state = {name.removeprefix("x."): part for name, part in parts.items()}
    again = compressor.compress(compressor.decompress(state, group), group)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file({f"x.{name}": part.contiguous() for name, part in again.items()}, theirs / "model.safetensors")
    (theirs / "config.json").write_bytes((folder / "config.json").read_bytes())
    np.testing.assert_allclose(ours(theirs, "x.weight"), ours(folder, "x.weight"), rtol=2.0**-7)


def zeros(*shape: int, dtype: str = "float32") -> Any:
    """Of a dtype of torch."""
    return torch.zeros(shape, dtype=getattr(torch, dtype))


@pytest.mark.parametrize(
    ("scheme", "part", "value", "error", "text"),
    [
        ("nvfp4", "weight_global_scale", None, CorruptModel, "weight_global_scale is not"),
        ("nvfp4", "weight_global_scale", zeros(1), CorruptModel, "it is 0"),
        ("nvfp4", "weight_global_scale", zeros(1) + np.inf, CorruptModel, "it is inf"),
        ("nvfp4", "weight_packed", zeros(64, 33, dtype="uint8"), CorruptModel, "weight_scale is not"),
        ("mxfp4", "weight_scale", zeros(64, 3, dtype="uint8"), CorruptModel, "weight_scale is not"),
        ("mxfp4", "weight_global_scale", zeros(1), UnsupportedModel, "global_scale"),
        ("mxfp8", "weight_scale", zeros(64, 2, dtype="int8"), UnsupportedModel, "scales of I8"),
        ("fp8_e4m3", "weight", zeros(64, 64, dtype="float8_e5m2"), UnsupportedModel, "F8_E5M2"),
        ("fp8_e4m3", "weight_scale", zeros(64, 2), CorruptModel, "neither that of rows nor"),
        ("fp8_e4m3", "weight_scale", zeros(32, 1), CorruptModel, "does not fit"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(
    tmp_path: Path, scheme: str, part: str, value: Any, error: type[ArrowQuantError], text: str
) -> None:
    from safetensors.torch import save_file

    write(tmp_path, [Item("a.weight", normal(64, 64), build_scheme(scheme, symmetric=True))])
    parts = load_file(tmp_path / "model.safetensors")
    parts = {name: x for name, x in (parts | {f"a.{part}": value}).items() if x is not None}
    save_file(parts, tmp_path / "model.safetensors")
    with pytest.raises(error, match=text):
        open_model(tmp_path)
