"""The library compressed-tensors decompresses what we write to the weights that we read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.engine.formats.registry import find_format, open_model
from service.engine.schemes.base import Scheme
from service.engine.schemes.registry import build_scheme
from tests.engine.formats.outputs import Item, Output, all_integer_schemes, label, normal

torch = pytest.importorskip("torch", reason="the extra `peers` is not installed")
compressed_tensors = pytest.importorskip("compressed_tensors", reason="the extra `peers` is not installed")
load_file = pytest.importorskip("safetensors.torch").load_file

SHAPES = ((64, 96), (9, 64), (70, 128), (33, 160))
#: Where the library's packing along the rows has its odd cases.
FEW_ROWS = tuple((rows, 96) for rows in range(1, 10))


def write(folder: Path, schemes: list[Scheme], shapes: tuple[tuple[int, int], ...] = SHAPES, **options: object) -> Path:
    """A model of small layers `l0`, `l1`, …, one for each scheme and shape, and one that is not quantized.

    Tensors that the format refuses are copied, as the engine does.
    """
    format_ = find_format("compressed-tensors")
    items = [
        Item(f"l{i * len(shapes) + j}.weight", normal(*shape, seed=i), scheme)
        for i, scheme in enumerate(schemes)
        for j, shape in enumerate(shapes)
    ]
    items = [replace(i, scheme=None) if format_.refuses_tensor(i.info, i.scheme) else i for i in items]
    Output(folder, format_, [*items, Item("head.weight", normal(4, 64))], options).run()
    return folder


def quantization_config(folder: Path) -> object:
    """As the library parses it."""
    from compressed_tensors.quantization import QuantizationConfig

    return QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])


def ours(folder: Path) -> dict[str, np.ndarray]:
    """Every quantized weight as this service reads it."""
    reader = open_model(folder)
    return {t.name: np.asarray(reader.rows(t, 0, t.rows)) for t in reader.tensors if t.stored_as}


def assert_close(theirs: object, expected: np.ndarray, scheme: Scheme) -> None:
    """Equal, up to their multiplication in the scale's dtype."""
    step = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}[scheme.scale_dtype]
    np.testing.assert_allclose(theirs.float().numpy(), expected, rtol=step, atol=step * 1e-3)  # type: ignore[attr-defined]


def check_decompressed(folder: Path, scheme: Scheme, layout: str) -> int:
    """The library's weights are ours; how many there are."""
    from compressed_tensors.compressors import BaseCompressor

    parts, config = load_file(folder / "model.safetensors"), quantization_config(folder)
    (group,) = config.config_groups.values()  # type: ignore[attr-defined]
    decompress = BaseCompressor.get_value_from_registry(layout).decompress
    weights = ours(folder)
    for name, expected in weights.items():
        module = name.removesuffix(".weight")
        state = {k.removeprefix(f"{module}."): v for k, v in parts.items() if k.startswith(f"{module}.")}
        assert_close(decompress(state, group)["weight"], expected, scheme)
    return len(weights)


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("scale_dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("scheme", list(all_integer_schemes()), ids=label)
def test_the_decompressor_gives_the_weights_that_we_read(
    tmp_path: Path, scheme: Scheme, scale_dtype: str, layout: str
) -> None:
    scheme = scheme.model_copy(update={"scale_dtype": scale_dtype})
    check_decompressed(write(tmp_path, [scheme], layout=layout), scheme, layout)


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("scheme", list(all_integer_schemes()), ids=label)
def test_the_decompressor_opens_what_is_quantized_of_very_few_rows(tmp_path: Path, scheme: Scheme, layout: str) -> None:
    folder = write(tmp_path, [scheme], FEW_ROWS, layout=layout)
    opened = check_decompressed(folder, scheme, layout)
    refused = scheme.bits == 4 and not scheme.symmetric and scheme.granularity == "group"
    assert opened == (1 if refused else len(FEW_ROWS)), "only these are to be copied"


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
def test_the_compressor_writes_the_same_bytes_for_the_same_scales(tmp_path: Path, layout: str) -> None:
    from compressed_tensors.compressors import BaseCompressor

    scheme = build_scheme("int4", symmetric=False, group_size=32, scale_dtype="F32")
    folder = write(tmp_path, [scheme], layout=layout)
    parts, config = load_file(folder / "model.safetensors"), quantization_config(folder)
    (group,) = config.config_groups.values()  # type: ignore[attr-defined]
    compressor = BaseCompressor.get_value_from_registry(layout)
    state = {k.removeprefix("l2."): v for k, v in parts.items() if k.startswith("l2.")}
    assert compressor.compress(compressor.decompress(state, group), group).keys() == state.keys()
    again = compressor.compress(compressor.decompress(state, group), group)
    for name, part in state.items():
        assert again[name].dtype == part.dtype, name
        assert torch.equal(again[name].reshape(part.shape), part), name


def test_mixed_schemes_reach_the_layers_they_were_written_for(tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import apply_quantization_config

    schemes = [
        build_scheme("int4", symmetric=True, group_size=32),
        build_scheme("int4", symmetric=True, group_size=32),
        build_scheme("int8", symmetric=True, granularity="channel", group_size=None),
        build_scheme("int3", symmetric=False, granularity="channel", group_size=None),
    ]
    folder = write(tmp_path, schemes)
    expected, parts = ours(folder), load_file(folder / "model.safetensors")
    names = [f"l{i}" for i in range(len(schemes) * len(SHAPES))] + ["head"]
    model = torch.nn.ModuleDict({n: torch.nn.Linear(SHAPES[i % 4][1], SHAPES[i % 4][0]) for i, n in enumerate(names)})
    apply_quantization_config(model, quantization_config(folder), show_progress=False)
    assert not hasattr(model["head"], "quantization_scheme")
    for i, name in enumerate(names[:-1]):
        group = model[name].quantization_scheme
        assert group.weights.num_bits == schemes[i // 4].bits
        state = {k.removeprefix(f"{name}."): v for k, v in parts.items() if re.match(rf"{name}\.", k)}
        decompress = BaseCompressor.get_value_from_registry(group.format).decompress
        assert_close(decompress(state, group)["weight"], expected[f"{name}.weight"], schemes[i // 4])


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_what_the_library_compresses_is_read(tmp_path: Path, strategy: str, symmetric: bool, num_bits: int) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from safetensors.torch import save_file

    args = QuantizationArgs(
        num_bits=num_bits, symmetric=symmetric, strategy=strategy, group_size=32 if strategy == "group" else None
    )
    group = QuantizationScheme(targets=["re:.*proj"], weights=args, format="pack-quantized")
    rng = np.random.default_rng(7)
    groups = 3 if strategy == "group" else 1
    half = 1 << (num_bits - 1)
    zero = rng.integers(-half, half, (40, groups))
    state = {
        "weight": torch.from_numpy(normal(40, 96)),
        "weight_scale": torch.from_numpy(rng.uniform(0.05, 0.2, (40, groups)).astype(np.float32)),
        "weight_zero_point": torch.from_numpy((zero * (not symmetric)).astype(np.int8)),
    }
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress(state, group)
    save_file({f"x.proj.{k}": v for k, v in packed.items()}, tmp_path / "model.safetensors")
    config = QuantizationConfig(config_groups={"group_0": group}, format="pack-quantized").model_dump(mode="json")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    read = ours(tmp_path)["x.proj.weight"]
    np.testing.assert_array_equal(compressor.decompress(packed, group)["weight"].numpy(), read)
