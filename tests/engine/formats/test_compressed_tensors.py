"""compressed-tensors written, read back, abandoned, and gone on with after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from service.engine.formats.compressed_tensors import CompressedTensorsFormat, CompressedTensorsOptions
from service.engine.formats.registry import open_model
from service.engine.formats.source import LocalFiles, SourceFile
from service.engine.schemes.base import Scheme
from service.engine.schemes.registry import build_scheme
from service.engine.tensors import CodeArray
from service.errors import ArrowQuantError, CorruptModel, UnsupportedModel
from service.storage.model_files import Identity
from tests.engine.formats.outputs import (
    BACKEND,
    Item,
    Output,
    all_float_schemes,
    all_integer_schemes,
    contents,
    label,
    normal,
)
from tests.engine.formats.resuming import check_abandoned, check_every_interruption

FORMAT = "compressed-tensors"
SHAPES = ((64, 96), (1, 64), (70, 128), (33, 160))
INT4 = build_scheme("int4", symmetric=False, group_size=32)
FLOATS = [
    scheme
    for scheme in all_float_schemes()
    if CompressedTensorsFormat.refuses_scheme(scheme, CompressedTensorsOptions()) is None
]
MakeOutput = Callable[..., Output]


def mixed_items() -> list[Item]:
    """Odd sizes on purpose: parts of 8k, 4k, 2k and odd bytes, copies of several dtypes."""
    schemes = [
        build_scheme("int3", symmetric=False, granularity="channel", group_size=None),
        build_scheme("int8", symmetric=True, granularity="channel", group_size=None),
        INT4,
    ]
    items = [Item(f"m{i}.{j}.weight", normal(*SHAPES[j], seed=i), s) for i, s in enumerate(schemes) for j in range(4)]
    copies = [
        Item("bias", normal(7)),
        Item("embed.weight", normal(9, 5, dtype=np.float16)),
        Item("ids", np.arange(3, dtype=np.int64)),
        Item("mask", np.array([True, False, True])),
        Item("empty", np.zeros((0, 3), np.float32)),
        Item("größe/“q”.weight", normal(3, 3)),
    ]
    return [x for pair in zip(items, copies, strict=False) for x in pair] + items[len(copies) :]


def check(made: Output, sums: dict[str, Any]) -> None:
    """Everything reads back, with the errors that were measured when it was written."""
    reader = open_model(made.folder)
    assert {t.name for t in reader.tensors} == {item.name for item in made.items}
    for item in made.items:
        info = reader.find(item.name)
        assert info is not None
        assert info.shape == item.data.shape
        if item.scheme is None:
            assert bytes(reader.raw(info, 0, info.nbytes)) == item.data.tobytes()
            continue
        assert info.stored_as == item.scheme.id
        pieces = [reader.rows(info, a, min(a + 13, info.rows)) for a in range(0, info.rows, 13)]
        errors = BACKEND.compare(item.data.reshape(info.rows, info.cols), np.concatenate(pieces))
        assert errors.sum_dd == pytest.approx(sums[item.name].sum_dd, rel=1e-9)
        assert errors.max_abs == pytest.approx(sums[item.name].max_abs, rel=1e-6)
    reader.close()


@pytest.mark.parametrize("layout", ["auto", "pack-quantized", "int-quantized"])
@pytest.mark.parametrize("scheme", list(all_integer_schemes()), ids=label)
def test_what_is_written_reads_back_with_the_same_errors(output: MakeOutput, scheme: Scheme, layout: str) -> None:
    items = [Item(f"a{i}.weight", normal(*shape, seed=i), scheme) for i, shape in enumerate(SHAPES)]
    made = output(FORMAT, [*items, Item("b", normal(7))], options={"layout": layout})
    check(made, made.run())


@pytest.mark.parametrize("scheme", FLOATS, ids=label)
def test_small_floats_read_back_with_the_same_errors(output: MakeOutput, scheme: Scheme) -> None:
    shapes = ((64, 96), (1, 128), (300, 256), (33, 160))
    items = [Item(f"a{i}.weight", normal(*shape, seed=i), scheme) for i, shape in enumerate(shapes)]
    held = [item for item in items if CompressedTensorsFormat.refuses_tensor(item.info, scheme) is None]
    assert len(held) == (2 if scheme.granularity == "block" else 4), "blocks take whole ones along the rows"
    made = output(FORMAT, [*held, Item("b", normal(7))])
    check(made, made.run())


@pytest.mark.parametrize("scale_dtype", ["F32", "F16", "BF16"])
def test_every_scale_dtype_is_kept(output: MakeOutput, scale_dtype: str) -> None:
    scheme = build_scheme("int4", symmetric=False, group_size=32, scale_dtype=scale_dtype)
    made = output(FORMAT, [Item("a.weight", normal(33, 64), scheme)])
    check(made, made.run())


@pytest.mark.parametrize("max_shard_bytes", [1, 5000, 10**9])
def test_shards_are_named_and_indexed_as_loaders_expect(output: MakeOutput, max_shard_bytes: int) -> None:
    made = output(FORMAT, mixed_items(), options={"max_shard_bytes": max_shard_bytes})
    check(made, made.run())
    files = sorted(made.folder.glob("*.safetensors"))
    if len(files) == 1:
        assert [p.name for p in files] == ["model.safetensors"]
        assert not (made.folder / "model.safetensors.index.json").exists()
        return
    assert [p.name for p in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    index = json.loads((made.folder / "model.safetensors.index.json").read_text())
    sizes = {name: x.nbytes for p in files for name, x in load_file(p).items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert {name: (made.folder / file).is_file() for name, file in index["weight_map"].items()} == dict.fromkeys(
        sizes, True
    )


def test_parts_lie_at_multiples_of_their_item_size(output: MakeOutput) -> None:
    made = output(FORMAT, mixed_items())
    made.run()
    raw = (made.folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    sizes = {"I64": 8, "I32": 4, "F32": 4, "F16": 2, "I8": 1, "BOOL": 1}
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0, name


@pytest.mark.parametrize("max_shard_bytes", [5000, 10**9])
def test_a_run_that_is_killed_anywhere_or_starts_tensors_again_ends_in_the_same_bytes(
    output: MakeOutput, max_shard_bytes: int
) -> None:
    def make(folder: str) -> Output:
        return output(FORMAT, mixed_items(), folder, options={"max_shard_bytes": max_shard_bytes})

    check_every_interruption(make)
    check_abandoned(make, build_scheme("int8", symmetric=False, granularity="channel", group_size=None))


def test_a_cancelled_close_returns_early(output: MakeOutput) -> None:
    made = output(FORMAT, mixed_items())
    writer = made.writer()
    for item in made.items:
        made.add(writer, item)
    writer.close(lambda: True)
    writer.discard()
    assert not list(made.folder.glob("*.safetensors"))


def test_the_configuration_groups_schemes_and_ignores_what_is_not_quantized(output: MakeOutput) -> None:
    made = output(FORMAT, mixed_items())
    made.run()
    config = json.loads((made.folder / "config.json").read_text())
    assert config["model_type"] == "test"
    described = config["quantization_config"]
    assert (described["quant_method"], described["format"]) == ("compressed-tensors", "mixed-precision")
    assert set(described["ignore"]) == {"embed", "größe/“q”", "lm_head"}
    groups = described["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear"]
    assert groups["group_1"]["targets"] == ["m1.0", "m1.1", "m1.2", "m1.3"]
    assert groups["group_1"]["format"] == "int-quantized"
    assert groups["group_0"]["weights"]["num_bits"] == 3


def test_copies_alone_make_a_plain_model(output: MakeOutput) -> None:
    made = output(FORMAT, [Item("a.weight", normal(4, 4))])
    made.run()
    assert open_model(made.folder).format_id == "safetensors"


def test_bits_per_weight_count_every_part(output: MakeOutput) -> None:
    made = output(FORMAT, [Item("a.weight", normal(64, 64), INT4)])
    made.run()
    (info,) = open_model(made.folder).tensors
    assert info.nbytes == 64 * 32 + 64 * 2 * 2 + 64 // 8 * 4 * 2 + 16
    assert info.nbytes == sum(x.nbytes for x in load_file(made.folder / "model.safetensors").values())


def test_schemes_and_tensors_that_its_loaders_do_not_know_are_refused() -> None:
    nf4 = build_scheme("nf4", symmetric=True)
    assert "not nf4" in str(CompressedTensorsFormat.refuses_scheme(nf4, CompressedTensorsOptions()))
    assert CompressedTensorsFormat.refuses_scheme(INT4, CompressedTensorsOptions()) is None
    assert CompressedTensorsFormat.refuses_tensor(Item("a.weight", normal(4, 4)).info, INT4) is None
    assert "4 dimensions" in str(
        CompressedTensorsFormat.refuses_tensor(Item("a.weight", normal(4, 4, 3, 3)).info, INT4)
    )
    assert "*.weight" in str(CompressedTensorsFormat.refuses_tensor(Item("a.kernel", normal(4, 4)).info, INT4))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("size", [32, None])
def test_of_few_rows_only_packed_zero_points_of_four_bits_in_groups_are_refused(
    rows: int, bits: int, symmetric: bool, size: int | None
) -> None:
    scheme = build_scheme(
        f"int{bits}", symmetric=symmetric, granularity="group" if size else "channel", group_size=size
    )
    refusal = CompressedTensorsFormat.refuses_tensor(Item("a.weight", normal(rows, 96)).info, scheme)
    assert (refusal is not None) == (rows <= 8 and bits == 4 and not symmetric and size is not None)
    assert refusal is None or f"{rows} rows" in refusal


def test_two_tensors_that_would_have_one_name_are_refused(output: MakeOutput) -> None:
    made = output(FORMAT, [Item("a.weight_scale", normal(4)), Item("a.weight", normal(4, 64), INT4)])
    with pytest.raises(UnsupportedModel, match=r"a\.weight_scale"):
        made.run()


def test_missing_rows_are_noticed_at_the_commit(output: MakeOutput) -> None:
    made = output(FORMAT, [Item("a.weight", normal(64, 64), INT4)])
    writer = made.writer()
    writer.begin(made.items[0].info, INT4)
    with pytest.raises(ValueError, match="0 of 64 rows"):
        writer.commit(None)
    writer.discard()


Parts = dict[str, np.ndarray]


def drop(name: str) -> Callable[[Parts], object]:
    return lambda parts: parts.pop(name)


def put(name: str, value: np.ndarray) -> Callable[[Parts], object]:
    return lambda parts: parts.update({name: value})


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (drop("a.weight_scale"), CorruptModel, "there is no a.weight_scale"),
        (drop("a.weight_shape"), CorruptModel, "weight_shape"),
        (put("a.weight_shape", np.array([64, 10**12])), CorruptModel, "cannot hold"),
        (put("a.weight_shape", np.array([64, -1])), CorruptModel, "cannot hold"),
        (put("a.weight_shape", np.array([65, 64])), CorruptModel, "cannot hold"),
        (put("a.weight_shape", np.array([64, 32])), CorruptModel, "no width"),
        (put("a.weight_shape", np.array([64])), CorruptModel, "two I64"),
        (put("a.weight_packed", np.zeros((64, 9), np.int32)), CorruptModel, "no width"),
        (put("a.weight_packed", np.zeros((64, 8), np.uint8)), UnsupportedModel, "is U8 with scales of F16"),
        (put("a.weight_packed", np.zeros((0, 8), np.int32)), CorruptModel, "no elements"),
        (put("a.weight_packed", np.zeros((2, 64, 8), np.int32)), UnsupportedModel, "3 dimensions"),
        (put("a.weight_scale", np.zeros((63, 2), np.float16)), CorruptModel, "does not fit"),
        (put("a.weight_scale", np.zeros((64, 0), np.float16)), CorruptModel, "does not fit"),
        (put("a.weight_scale", np.zeros((64, 3), np.float16)), UnsupportedModel, "groups of"),
        (put("a.weight_scale", np.zeros((64, 2), np.int16)), UnsupportedModel, "scales of I16"),
        (put("a.weight_zero_point", np.zeros((1,), np.int32)), CorruptModel, "weight_zero_point is not"),
        (put("a.weight_zero_point", np.zeros((64, 2), np.int8)), CorruptModel, "weight_zero_point is not"),
        (put("a.weight_g_idx", np.zeros(64, np.int32)), UnsupportedModel, "g_idx"),
        (put("a.weight_global_scale", np.zeros(1, np.float32)), UnsupportedModel, "global_scale"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(
    output: MakeOutput, change: Callable[[Parts], object], error: type[ArrowQuantError], text: str
) -> None:
    made = output(FORMAT, [Item("a.weight", normal(64, 64), INT4)])
    made.run()
    path = made.folder / "model.safetensors"
    parts = load_file(path)
    change(parts)
    save_file(parts, path)
    with pytest.raises(error, match=text) as caught:
        open_model(made.folder)
    assert str(made.folder) not in caught.value.detail


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"config_groups": None}, CorruptModel, "config_groups"),
        ({"format": "mxfp6-pack-quantized"}, UnsupportedModel, "mxfp6"),
        ({"transform_config": {"a": 1}}, UnsupportedModel, "transforms"),
        ({"config_groups": {"g": {"weights": {"num_bits": 6, "type": "float"}}}}, UnsupportedModel, "type float"),
        ({"config_groups": {"g": {"weights": {"num_bits": 7, "type": "int"}}}}, UnsupportedModel, "7 bits"),
        ({"config_groups": {"g": {"weights": {"num_bits": [], "type": "int"}}}}, UnsupportedModel, "bits"),
    ],
)
def test_configurations_that_are_not_read_are_refused(
    output: MakeOutput, change: dict[str, Any], error: type[ArrowQuantError], text: str
) -> None:
    made = output(FORMAT, [Item("a.weight", normal(64, 64), INT4)])
    made.run()
    path = made.folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=text):
        open_model(made.folder)


class CountedFile(SourceFile):
    """A file that notes how many bytes are asked of it."""

    counts: list[int]

    def read(self, offset: int, count: int) -> CodeArray:
        self.counts.append(count)
        return super().read(offset, count)


class CountedFiles(LocalFiles):
    """Files of this machine that note what is read of them, all in one list."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.counts: list[int] = []

    def open(self, name: PurePosixPath, expected: Identity | None = None) -> CountedFile:
        file = CountedFile(self.root, name, expected)
        file.counts = self.counts
        return file


def test_rows_read_no_more_than_they_need(output: MakeOutput) -> None:
    made = output(FORMAT, [Item("a.weight", normal(640, 128), INT4)])
    made.run()
    files = CountedFiles(made.folder)
    reader = open_model(files)
    files.counts.clear()
    reader.rows(reader.tensors[0], 100, 110)
    # Codes, scales, and the block of 32 rows in which the zero points lie.
    assert sum(files.counts) == 10 * 64 + 10 * 4 * 2 + 4 * 4 * 4


def test_a_pipeline_keeps_its_folders(tmp_path: Path) -> None:
    from dataclasses import replace
    from pathlib import PurePosixPath

    from service.engine.formats.registry import find_format

    made = Output(tmp_path / "out", find_format(FORMAT), [Item("a.weight", normal(64, 64), INT4)])
    writer = made.writer()
    layout = replace(writer.context.layout, weights_dir=PurePosixPath("transformer"), stem="diffusion_pytorch_model")
    writer = made.format.writer(made.folder, replace(writer.context, layout=layout))
    made.add(writer, made.items[0])
    writer.close(lambda: False)
    assert set(contents(made.folder)) == {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }
