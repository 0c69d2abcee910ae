"""The safetensors reader against files of the library itself, and against crafted ones."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from service.engine.formats.registry import open_model
from service.errors import ArrowQuantError, CorruptModel, ForbiddenPath, ModelNotFound, SourceChanged, UnknownDtype
from tests.engine.formats.outputs import normal

F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
F32_TEXT = json.dumps(F32)


def craft(path: Path, header: Any, data: bytes = bytes(16)) -> Path:
    """A file with this header, given as JSON, text or bytes."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A file written by the library."""
    save_file(tensors, path, {"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
def test_every_float_dtype_reads_as_the_library_wrote_it(tmp_path: Path, dtype: Any) -> None:
    data = normal(7, 5, dtype=dtype)
    reader = open_model(save(tmp_path / "a.safetensors", {"w": data}))
    (info,) = reader.tensors
    assert (info.name, info.shape, info.rows, info.cols) == ("w", (7, 5), 7, 5)
    rows = reader.rows(info, 2, 6)
    assert rows.dtype == data.dtype
    np.testing.assert_array_equal(rows.view(np.uint8), np.ascontiguousarray(data[2:6]).view(np.uint8))
    assert bytes(reader.raw(info, 3, 11)) == data.tobytes()[3:11]
    reader.close()


def test_integers_scalars_empty_and_one_dimensional_tensors_read_raw(tmp_path: Path) -> None:
    tensors = {
        "ids": np.arange(5, dtype=np.int64),
        "flag": np.array([True, False, True]),
        "one": np.array(3, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }
    reader = open_model(save(tmp_path / "a.safetensors", tensors))
    for info in reader.tensors:
        assert bytes(reader.raw(info, 0, info.nbytes)) == tensors[info.name].tobytes()
    one = reader.find("one")
    assert one is not None
    assert reader.rows(one, 0, 1).tolist() == [[3.0]]


def test_offsets_need_no_alignment(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [1, 2], "data_offsets": [3, 11]},
    }
    path = craft(tmp_path / "a.safetensors", header, b"abc" + np.array([1.5, 2.5], "<f4").tobytes())
    reader = open_model(path)
    info = reader.find("b")
    assert info is not None
    assert reader.rows(info, 0, 1).tolist() == [[1.5, 2.5]]


def test_subbyte_dtypes_are_copied_by_their_bytes(tmp_path: Path) -> None:
    path = craft(tmp_path / "a.safetensors", {"w": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}, b"xyz")
    (info,) = open_model(path).tensors
    assert info.nbytes == 3
    assert not info.is_float


def entry(**changes: Any) -> dict[str, Any]:
    """A header whose one tensor is wrong in these fields."""
    return {"w": F32 | changes}


BAD_HEADERS: dict[str, tuple[Any, type[ArrowQuantError], str]] = {
    "overlap": ({"w": F32, "v": F32 | {"data_offsets": [0, 16]}}, CorruptModel, "overlap"),
    "partial overlap": (
        {"w": F32, "v": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}, CorruptModel, "overlap",
    ),
    "hole": ({"w": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}, CorruptModel, "belong to no tensor"),
    "rest": ({"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}, CorruptModel, "belong to no tensor"),
    "outside": (entry(shape=[4, 2], data_offsets=[0, 32]), CorruptModel, "the file at"),
    "size": (entry(shape=[3, 2]), CorruptModel, "span 16 bytes"),
    "backwards": (entry(data_offsets=[16, 0]), CorruptModel, "data_offsets"),
    "three offsets": (entry(data_offsets=[0, 8, 16]), CorruptModel, "data_offsets"),
    "negative offset": (entry(data_offsets=[-1, 15]), CorruptModel, "data_offsets"),
    "negative shape": (entry(shape=[-2, -2]), CorruptModel, "shape"),
    "huge shape": (entry(shape=[2**62, 2**62, 0, 2**63]), CorruptModel, "shape"),
    "huge product": (entry(shape=[2**62] * 60), CorruptModel, "elements"),
    "many dimensions": (entry(shape=[1] * 1000), CorruptModel, "dimensions"),
    "float shape": (entry(shape=[2.0, 2]), CorruptModel, "shape"),
    "bool shape": (entry(shape=[True, 4]), CorruptModel, "shape"),
    "text shape": (entry(shape="22"), CorruptModel, "shape"),
    "dtype": (entry(dtype="F128"), UnknownDtype, "F128"),
    "list dtype": (entry(dtype=["F32"]), UnknownDtype, "F32"),
    "no dtype": ({"w": {"shape": [1], "data_offsets": [0, 16]}}, CorruptModel, "dtype"),
    "no object": ({"w": 3}, CorruptModel, "dtype"),
    "half a byte": ({"w": {"dtype": "F4", "shape": [31], "data_offsets": [0, 16]}}, CorruptModel, "span"),
    "metadata": ({"__metadata__": {"a": 1}, "w": F32}, CorruptModel, "__metadata__"),
    "metadata list": ({"__metadata__": [], "w": F32}, CorruptModel, "__metadata__"),
    "duplicate": (f'{{"w":{F32_TEXT},"w":{F32_TEXT}}}', CorruptModel, "occurs twice"),
    "duplicate inside": ('{"w":{"dtype":"F32","dtype":"U8","shape":[4],"data_offsets":[0,16]}}', CorruptModel, "twice"),
    "duplicate metadata": (
        f'{{"__metadata__":{{"k:":"a:b","l":"c"}},"__metadata__":{{"k":"::"}},"w":{F32_TEXT}}}', CorruptModel, "twice",
    ),
    "duplicate behind an escape": (f'{{"w":{F32_TEXT},"\\u0077":{F32_TEXT}}}', CorruptModel, "twice"),
    "list": ([], CorruptModel, "not a JSON object"),
    "no json": ("{nonsense", CorruptModel, "no valid JSON"),
    "not utf-8": (b"\xff\xfe{}", CorruptModel, "no valid JSON"),
    "surrogate": (f'{{"\\ud800":{F32_TEXT}}}', CorruptModel, "no valid JSON"),
    "infinity": ('{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,16]}}', CorruptModel, "no valid JSON"),
    "long number": ('{"w":{"dtype":"F32","shape":[%s],"data_offsets":[0,16]}}' % ("9" * 9999), CorruptModel, "JSON"),
    "nested": ("[" * 200_000, CorruptModel, "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_header_that_lies_is_refused_with_the_file_and_the_tensor(tmp_path: Path, case: str) -> None:
    header, error, text = BAD_HEADERS[case]
    path = craft(tmp_path / "bad.safetensors", header)
    with pytest.raises(error, match=text) as caught:
        open_model(path)
    assert type(caught.value) is error
    assert "bad.safetensors" in caught.value.detail
    assert str(tmp_path) not in caught.value.detail
    if "Tensor" in caught.value.detail:
        assert caught.value.tensor in ("w", "v")


@pytest.mark.parametrize("name", ["a:b", 'a\\"b', "a\\u003ab", "a\\ud83d\\ude00", "ä:::"])
def test_a_name_with_colons_or_escapes_is_read_as_any_other(tmp_path: Path, name: str) -> None:
    metadata = '{"format":"pt","notes":"{\\"a\\": \\"b:c\\"}"}'
    path = craft(tmp_path / "m.safetensors", f'{{"__metadata__":{metadata},"{name}":{F32_TEXT}}}')
    assert [info.name for info in open_model(path).tensors] == [json.loads(f'"{name}"')]


@pytest.mark.parametrize("length", [0, 4, 7])
def test_a_file_shorter_than_a_header_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(bytes(length))
    with pytest.raises(CorruptModel, match="too few"):
        open_model(path)


@pytest.mark.parametrize("claimed", [2_000_000_000, 100_000_001, 2**64 - 1, 1000])
def test_a_header_length_that_cannot_be_is_refused_before_anything_is_read(tmp_path: Path, claimed: int) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + bytes(100))
    with pytest.raises(CorruptModel, match="header claims"):
        open_model(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"w": normal(64, 64)})
    os.truncate(path, 8000)
    with pytest.raises(CorruptModel, match="the file at 8000") as caught:
        open_model(path)
    assert caught.value.tensor == "w"


def replace_it(path: Path) -> None:
    path.with_name("other").write_bytes(path.read_bytes())
    path.with_name("other").replace(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: os.truncate(p, 100), "is shorter"),
        (lambda p: p.unlink(), "was removed"),
        (replace_it, "was changed or replaced"),
        (lambda p: os.utime(p, ns=(1, 1)), "was changed or replaced"),
    ],
    ids=["truncated", "removed", "replaced", "touched"],
)
def test_a_source_that_changes_is_an_error_and_no_crash(
    tmp_path: Path, change: Callable[[Path], object], text: str
) -> None:
    path = save(tmp_path / "a.safetensors", {"w": normal(64, 64)})
    reader = open_model(path)
    (info,) = reader.tensors
    reader.rows(info, 0, 64)
    change(path)
    with pytest.raises(SourceChanged, match=text):
        reader.rows(info, 0, 64)
    with pytest.raises(SourceChanged):
        reader.raw(info, 0, info.nbytes)
    reader.close()


def shards(folder: Path, weight_map: dict[str, Any] | None = None) -> Path:
    """Two shards and their index."""
    save(folder / "m-00001-of-00002.safetensors", {"a": normal(4, 4, seed=1)})
    save(folder / "m-00002-of-00002.safetensors", {"b": normal(4, 4, seed=2)})
    default = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    index = {"metadata": {"total_size": 128}, "weight_map": default if weight_map is None else weight_map}
    path = folder / "m.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_sharded_index_reads_as_one_model(tmp_path: Path, as_folder: bool) -> None:
    index = shards(tmp_path)
    reader = open_model(tmp_path if as_folder else index)
    assert [t.name for t in reader.tensors] == ["a", "b"]
    np.testing.assert_array_equal(reader.rows(reader.tensors[1], 0, 4), normal(4, 4, seed=2))
    assert reader.layout.stem == "m"
    assert {p.name for p in reader.files} == {p.name for p in tmp_path.iterdir()}


BAD_MAPS: dict[str, tuple[Any, type[ArrowQuantError], str]] = {
    "absent file": ({"a": "m-00003-of-00002.safetensors"}, CorruptModel, "not there"),
    "wrong shard": ({"a": "m-00002-of-00002.safetensors"}, CorruptModel, "is not in"),
    "unknown tensor": ({"c": "m-00002-of-00002.safetensors"}, CorruptModel, "is not in"),
    "parent": ({"a": "../m-00001-of-00002.safetensors"}, ForbiddenPath, "outside"),
    "hidden parent": ({"a": "x/../../y.safetensors"}, ForbiddenPath, "outside"),
    "absolute": ({"a": "/etc/m.safetensors"}, ForbiddenPath, "outside"),
    "backslash": ({"a": "..\\m.safetensors"}, ForbiddenPath, "outside"),
    "zero byte": ({"a": "m\0.safetensors"}, CorruptModel, "in no"),
    "not a name": ({"a": 3}, CorruptModel, "in no"),
    "another file": ({"a": "config.json"}, CorruptModel, "in no"),
    "nothing": ({}, CorruptModel, "weight_map"),
    "a list": (["a"], CorruptModel, "weight_map"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_an_index_that_lies_or_leaves_the_folder_is_refused(tmp_path: Path, case: str) -> None:
    weight_map, error, text = BAD_MAPS[case]
    path = shards(tmp_path, weight_map)
    with pytest.raises(error, match=text) as caught:
        open_model(path)
    assert str(tmp_path) not in caught.value.detail


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", {"w": normal(2, 2)})
    save(tmp_path / "b.safetensors", {"w": normal(2, 2)})
    with pytest.raises(CorruptModel, match=r"in a\.safetensors and in b\.safetensors"):
        open_model(tmp_path)


def test_a_tensor_that_the_index_does_not_list_is_read_with_a_warning(tmp_path: Path) -> None:
    path = shards(tmp_path, {"a": "m-00001-of-00002.safetensors"})
    save(tmp_path / "m-00001-of-00002.safetensors", {"a": normal(2, 2), "extra": normal(2, 2)})
    reader = open_model(path)
    assert {t.name for t in reader.tensors} == {"a", "extra"}
    assert any("extra" in warning for warning in reader.layout.warnings)


def test_a_duplicate_key_in_an_index_is_refused(tmp_path: Path) -> None:
    path = shards(tmp_path)
    path.write_text('{"weight_map": {"a": "m-00001-of-00002.safetensors", "a": "m-00002-of-00002.safetensors"}}')
    with pytest.raises(CorruptModel, match="occurs twice"):
        open_model(path)


def test_a_path_where_nothing_is_has_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        open_model(tmp_path / "nothing.safetensors")


def test_a_pipe_in_place_of_weights_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelNotFound):
        open_model(tmp_path)
