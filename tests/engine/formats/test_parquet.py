"""Parquet written, read back, abandoned, and gone on with after a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.engine.beside import Beside
from service.engine.formats import parquet_cells, parquet_groups, parquet_writer
from service.engine.formats.registry import open_model
from service.engine.methods.minmax import MinMax
from service.engine.metrics import Quality
from service.engine.schemes.base import Scheme
from service.engine.schemes.registry import build_scheme
from service.errors import ArrowQuantError, CorruptModel, SourceChanged, UnknownDtype, UnsupportedModel
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
from tests.engine.formats.test_compressed_tensors import check, mixed_items

FORMAT = "parquet"
#: Rows that end within a word and within a group among them.
SHAPES = ((64, 96), (1, 65), (170, 128), (33, 161), (40, 3, 5))
INT4 = build_scheme("int4", symmetric=False, group_size=32)
INT8 = build_scheme("int8", symmetric=False, granularity="channel", group_size=None)
NF4 = [
    build_scheme("nf4", symmetric=True),
    build_scheme("nf4", symmetric=True, granularity="channel", group_size=None),
    build_scheme("nf4", symmetric=True, granularity="tensor", group_size=None),
]
NESTED = [build_scheme(f"int{bits}_nested", symmetric=False) for bits in (2, 3, 4, 5, 6)]
#: Of chunks, of cells that do not wait for others, of pages and of row groups.
SMALL = {"CHUNK_BYTES": 720, "DIRECT_BYTES": 500, "PAGE_BYTES": 600, "ROW_GROUP_BYTES": 2400, "ROW_GROUP_ROWS": 5}
MakeOutput = Callable[..., Output]


@pytest.mark.parametrize("scheme", [*all_integer_schemes(), *all_float_schemes(), *NF4, *NESTED], ids=label)
def test_what_is_written_reads_back_with_the_same_errors(output: MakeOutput, scheme: Scheme) -> None:
    items = [Item(f"a{i}.weight", normal(*shape, seed=i), scheme) for i, shape in enumerate(SHAPES)]
    made = output(FORMAT, [*items, Item("b", normal(7))])
    check(made, made.run())
    assert [t.name for t in open_model(made.folder).tensors] == [item.name for item in made.items]


@pytest.mark.parametrize("max_file_bytes", [1, 5000, 10**9])
def test_files_are_rolled_and_read_as_one_model(output: MakeOutput, max_file_bytes: int) -> None:
    made = output(FORMAT, mixed_items(), options={"max_file_bytes": max_file_bytes})
    check(made, made.run())
    names = sorted(contents(made.folder))
    assert names == ["metadata.json", *(f"model-{i:05d}.parquet" for i in range(len(names) - 1))]


@pytest.mark.parametrize("chunk_bytes", [24, 240, 4800])
def test_large_tensors_are_cut_into_chunks_of_whole_rows(
    output: MakeOutput, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(parquet_writer, "CHUNK_BYTES", chunk_bytes)
    made = output(
        FORMAT, [*mixed_items(), Item("long", normal(1000, dtype=np.float64))], options={"max_file_bytes": 2000}
    )
    check(made, made.run())
    tables = [pq.read_table(p) for p in sorted(made.folder.glob("*.parquet"))]
    rows = pa.concat_tables(tables).to_pylist()
    for name in {row["layer_name"] for row in rows}:
        chunks = [row for row in rows if row["layer_name"] == name]
        assert [row["chunk_index"] for row in chunks] == list(range(len(chunks)))
    assert max(row["chunk_index"] for row in rows) > 0


@pytest.mark.parametrize(
    ("sizes", "max_file_bytes"),
    [
        pytest.param({}, 3000, id="several files"),
        pytest.param({}, 10**9, id="one file"),
        pytest.param(SMALL, 9000, id="tensors that span row groups and files"),
    ],
)
def test_a_run_that_is_killed_anywhere_or_starts_tensors_again_ends_in_the_same_bytes(
    output: MakeOutput, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], max_file_bytes: int
) -> None:
    for name, value in sizes.items():
        for module in (m for m in (parquet_cells, parquet_groups, parquet_writer) if hasattr(m, name)):
            monkeypatch.setattr(module, name, value)

    def make(folder: str) -> Output:
        return output(FORMAT, mixed_items(), folder, options={"max_file_bytes": max_file_bytes})

    check_every_interruption(make)
    check_abandoned(make, INT8)


def test_a_large_cell_is_written_where_it_stays_and_a_small_one_with_others(
    output: MakeOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_groups, "DIRECT_BYTES", 1000)
    items = [Item(f"small{i}", normal(16, seed=i), None) for i in range(3)]
    items += [Item("large.weight", normal(64, 96), INT4), Item("last", normal(3))]
    made = output(FORMAT, items)
    writer = made.writer()
    for item in items[:4]:
        made.add(writer, item)
    writer.state()
    (part,) = made.folder.glob("*.part-*")
    before = part.read_bytes()
    made.add(writer, items[4])
    writer.close(lambda: False)
    assert (made.folder / "model-00000.parquet").read_bytes().startswith(before)
    cells = {row["layer_name"]: row["data"] for row in pq.read_table(made.folder / "model-00000.parquet").to_pylist()}
    at = [before.index(cells[item.name]) for item in items[:4]]
    assert at == sorted(at)
    assert at[1] - at[0] == at[2] - at[1] == 64 + 4, "cells of a page follow each other"


@pytest.mark.parametrize("max_file_bytes", [3000, 10**9])
@pytest.mark.parametrize("abandons", [False, True])
def test_the_hashes_of_files_are_made_on_the_way_and_are_theirs(
    output: MakeOutput, monkeypatch: pytest.MonkeyPatch, max_file_bytes: int, abandons: bool
) -> None:
    for name, value in {"DIRECT_BYTES": 500, "FOLLOWED_BYTES": 500}.items():
        monkeypatch.setattr(parquet_groups, name, value)
    made = output(FORMAT, mixed_items(), options={"max_file_bytes": max_file_bytes})
    writer = made.writer()
    for item in made.items:
        if abandons and item.scheme:
            made.write(writer, item, INT8)
            writer.abandon()
        made.add(writer, item)
        writer.state()
    writer.close(lambda: False)
    hashed: list[int] = []
    digests = {path: writer.digest(path, hashed.append) for path in sorted(made.folder.glob("*.parquet"))}
    writer.discard()
    known = {path: digest for path, digest in digests.items() if digest is not None}
    assert known == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in known}
    assert sum(hashed) == sum(path.stat().st_size for path in known)
    assert abandons or len(known) == len(digests)


def test_the_columns_say_what_a_reader_has_to_know(output: MakeOutput) -> None:
    made = output(FORMAT, [Item("a.weight", normal(64, 96), INT4), Item("b", normal(3, dtype=np.float16))])
    writer = made.writer()
    sums = made.write(writer, made.items[0])
    quality = Quality.of(sums, 100)
    writer.commit(quality)
    made.add(writer, made.items[1])
    writer.close(lambda: False)
    table = pq.read_table(made.folder / "model-00000.parquet")
    first, second = table.to_pylist()
    data = first.pop("data")
    assert len(data) == 64 * 96 // 2
    assert len(first.pop("scales")) == 2 * len(first.pop("zero_points")) == 64 * 3 * 2
    assert first == {
        "layer_name": "a.weight", "shape": [64, 96], "dtype": "F32", "num_params": 6144, "quant_type": "int4",
        "bit_width": 4, "packing": "little_endian_bit_stream", "chunk_index": 0, "chunk_offset": 0,
        "scale_dtype": "F16", "quant_axis": 0, "group_size": 32, "block_rows": None, "tensor_scale": None,
        "input_scale": None, "low_rank_up": None, "low_rank_down": None,
            "is_diffusion_model": False, "modality": "text", "time_group_bounds": None,
        "activation_scale": None, "activation_zero_point": None,
        "cosine_similarity": quality.cosine_similarity, "sqnr_db": quality.sqnr_db,
        "relative_error": quality.relative_error, "max_abs_error": quality.max_abs_error,
        "bits_per_weight": quality.bits_per_weight, "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    assert (second["quant_type"], second["dtype"], second["data"]) == ("none", "F16", made.items[1].data.tobytes())
    assert {k for k, v in second.items() if v is None} >= {"bit_width", "scales", "zero_points", "cosine_similarity"}
    metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    assert metadata["arrowquant.format_version"] == "2"
    assert json.loads(metadata["arrowquant.config"]) == {"bit_width": 4}
    assert metadata["arrowquant.source_fingerprint"] == "0" * 64
    assert metadata["arrowquant.service_version"] == "1.2.3"
    assert json.loads((made.folder / "metadata.json").read_text())["modality"] == "text"


def test_bits_per_weight_count_every_part(output: MakeOutput) -> None:
    made = output(FORMAT, [Item("a.weight", normal(64, 64), INT4)])
    writer = made.writer()
    made.write(writer, made.items[0])
    written = writer.commit(None)
    writer.close(lambda: False)
    (info,) = open_model(made.folder).tensors
    assert info.nbytes == written == 64 * 32 + 64 * 2 * 2 + 64 * 2


def test_what_is_stored_beside_a_tensor_is_in_its_columns_and_weights_read_back_unscaled(
    output: MakeOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_writer, "CHUNK_BYTES", SMALL["CHUNK_BYTES"])
    divisor = np.random.default_rng(3).uniform(0.25, 4.0, 96).astype(np.float32)
    x, groups = normal(64, 96), np.array([0, 3, 10], np.uint32)
    ranges = np.array([0.5, 0.25], np.float32)
    beside = Beside(divisor, groups, ranges, np.array([7, 8], np.float32))
    made = output(FORMAT, [Item("a.weight", x * divisor, INT4, beside), Item("b.weight", x, INT4)])
    made.run()
    [path] = made.folder.glob("*.parquet")
    first, last = (pq.read_table(path).to_pylist()[at] for at in (0, -1))
    assert (first["input_scale"], first["time_group_bounds"]) == (divisor.tolist(), [0, 3, 10])
    assert (first["activation_scale"], first["activation_zero_point"]) == ([0.5, 0.25], [7.0, 8.0])
    assert last["input_scale"] is None
    reader = open_model(made.folder)
    read = np.concatenate([reader.rows(reader.tensors[0], start, start + 16) for start in range(0, 64, 16)])
    reader.close()
    q = BACKEND.quantize(x * divisor, INT4, MinMax())
    assert np.array_equal(read, BACKEND.dequantize(q) / divisor)
    assert BACKEND.compare(x, read).cosine_similarity > 0.98


def test_a_single_file_reads_without_its_folder(output: MakeOutput) -> None:
    made = output(FORMAT, [Item("a.weight", normal(64, 64), INT4)])
    made.run()
    reader = open_model(made.folder / "model-00000.parquet")
    assert (reader.layout.modality, len(reader.tensors)) == ("text", 1)


def test_a_cancelled_close_returns_early(output: MakeOutput) -> None:
    made = output(FORMAT, mixed_items())
    writer = made.writer()
    for item in made.items:
        made.add(writer, item)
    writer.close(lambda: True)
    writer.discard()
    assert not list(made.folder.glob("*.parquet"))


def read_first(folder: Path) -> None:
    reader = open_model(folder)
    reader.rows(reader.tensors[0], 0, 64)


def first_row(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: row | changes


def byte(row: dict[str, Any]) -> dict[str, Any]:
    data = bytearray(row["data"])
    data[5] ^= 1
    return row | {"data": bytes(data)}


def shorter(row: dict[str, Any]) -> dict[str, Any]:
    data = row["data"][:-1]
    return row | {"data": data, "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (first_row(shape=[64, 10**12]), CorruptModel, "num_params"),
        (first_row(shape=None), CorruptModel, "no `shape`"),
        (first_row(layer_name=None), CorruptModel, "no `layer_name`"),
        (first_row(dtype="F1"), UnknownDtype, "F1"),
        (first_row(quant_type="int7"), UnsupportedModel, "int7"),
        (first_row(packing="big_endian"), UnsupportedModel, "big_endian"),
        (first_row(scale_dtype="I8"), UnsupportedModel, "I8"),
        (first_row(bit_width=5), CorruptModel, "bit_width"),
        (first_row(group_size=33), UnsupportedModel, "groups of 33"),
        (first_row(group_size=64), CorruptModel, "scales"),
        (first_row(scales=b"123"), CorruptModel, "scales"),
        (first_row(scales=None), CorruptModel, "scales"),
        (first_row(zero_points=b"123"), CorruptModel, "zero_points"),
        (first_row(chunk_index=1), CorruptModel, "chunk"),
        (first_row(chunk_offset=64), CorruptModel, "chunk"),
        (first_row(layer_name="b"), CorruptModel, "two tensors"),
        (first_row(input_scale=[1.0] * 63), CorruptModel, "`input_scale` has to be 64 numbers"),
        (first_row(input_scale=[0.0] * 64), CorruptModel, "above 0"),
        (first_row(input_scale=[1.0, None] * 32), CorruptModel, "above 0"),
        (byte, CorruptModel, "sha256"),
        (shorter, CorruptModel, "bytes for"),
    ],
)
def test_cells_that_contradict_each_other_are_refused(
    output: MakeOutput, change: Callable[[dict[str, Any]], dict[str, Any]], error: type[ArrowQuantError], text: str
) -> None:
    made = output(FORMAT, [Item("a.weight", normal(64, 64), INT4), Item("b", normal(8))])
    made.run()
    path = made.folder / "model-00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    pq.write_table(pa.Table.from_pylist([change(rows[0]), rows[1]], schema=table.schema), path)
    with pytest.raises(error, match=text) as caught:
        read_first(made.folder)
    assert str(made.folder) not in caught.value.detail


def test_another_table_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UnsupportedModel, match="no column 'layer_name'"):
        open_model(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", os.urandom(1000)])
def test_what_is_no_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(CorruptModel, match=r"a\.parquet is damaged"):
        open_model(tmp_path / "a.parquet")


def test_a_source_that_changes_is_an_error(output: MakeOutput) -> None:
    made = output(FORMAT, [Item("a.weight", normal(64, 64), INT4)])
    made.run()
    reader = open_model(made.folder)
    os.truncate(made.folder / "model-00000.parquet", 100)
    with pytest.raises(SourceChanged):
        reader.rows(reader.tensors[0], 0, 64)
