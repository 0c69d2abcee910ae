"""Valid inputs of every target, and those spoilt in ways that blind changes of bytes would hardly find."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from bench.engine import Job, run
from service.engine.backends.reference import ReferenceBackend
from service.engine.config import Profile, QuantizationConfig, resolve
from service.engine.table_io import write_table
from service.engine.tables import Tools, quantize_table

INDEX = "model.safetensors.index.json"
DIGEST = "0" * 64
#: Kinds of calibration, by the ends of their names.
CALIBRATIONS = ("safetensors", "parquet", "gguf")


def _weights(rows: int = 4, cols: int = 32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)


@cache
def safetensors() -> tuple[bytes, ...]:
    """Whole files."""
    x = _weights(2, 8)
    return (
        save({"a.weight": x, "b": x[0]}, {"format": "pt"}),
        save({"w": x.astype(np.float16), "i": np.arange(3), "e": np.empty((0, 4), np.float32)}),
        save({"s": np.array(1.0, np.float64), "b": x.astype(ml_dtypes.bfloat16)}),
        _safetensors({}, b""),
        _safetensors({"f": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"x"),
        _safetensors({"h": {"dtype": "F32", "shape": [1 << 60, 1 << 60], "data_offsets": [0, 1 << 60]}}, b""),
        _safetensors({"z": {"dtype": "F32", "shape": [1 << 62, 0], "data_offsets": [0, 0]}}, b""),
        (1 << 60).to_bytes(8, "little") + b"{}",
        (99_999_999).to_bytes(8, "little") + b"[" * 60_000,
    )


def _safetensors(entries: Mapping[str, Any], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


@cache
def shards() -> Mapping[str, bytes]:
    """A model of two files and an index, by file name."""
    x = _weights(2, 8)
    return {
        INDEX: json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}).encode(),
        "a.safetensors": save({"a": x}),
        "b.safetensors": save({"b": x}),
    }


def of_shards() -> Sequence[bytes]:
    """Each behind the number of the file that it is."""
    return _numbered(shards(), [INDEX, "a.safetensors"])


@cache
def compressed() -> Mapping[str, bytes]:
    """A small quantized model, by file name."""
    return _quantized("compressed-tensors")


def of_compressed() -> Sequence[bytes]:
    """Each behind the number of the file that it is."""
    return _numbered(compressed(), ["config.json", "model.safetensors"])


@cache
def parquet_folder() -> Mapping[str, bytes]:
    """A small model in Parquet with what lies beside it, by file name."""
    entry = {"path": "model-00000.parquet", "size_bytes": 1, "sha256": DIGEST}
    manifest = {"files": [entry], "source_fingerprint": DIGEST, "format": "parquet"}
    return _quantized("parquet") | {"manifest.json": json.dumps(manifest).encode()}


def of_manifest() -> Sequence[bytes]:
    """Each behind the number of the file that it is."""
    return _numbered(parquet_folder(), ["manifest.json", "metadata.json"])


def _numbered(files: Mapping[str, bytes], names: Sequence[str]) -> list[bytes]:
    return [bytes([i]) + files[name] for i, name in enumerate(names)]


@cache
def _quantized(format_id: str) -> Mapping[str, bytes]:
    with TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        tensors = {"layers.0.weight": _weights(4, 64), "layers.1.weight": _weights(4, 64), "norm": _weights(1, 64)[0]}
        (source / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        (source / "config.json").write_text('{"model_type": "bert"}')
        config = {"group_size": 32, "skip": ["layers.1.*"]}
        run(Job(source, Path(folder) / "work", (format_id,), config=config), ReferenceBackend())
        return {p.name: p.read_bytes() for p in (Path(folder) / "work" / format_id).iterdir() if p.is_file()}


@cache
def parquet() -> tuple[bytes, ...]:
    """Whole files: as the service writes them, as others would write them anew, and with cells that lie."""
    whole = parquet_folder()["model-00000.parquet"]
    table = pq.read_table(io.BytesIO(whole))
    first = table.slice(0, 1).to_pylist()[0]
    made = [whole]
    for options in ({}, {"compression": "zstd"}, {"use_dictionary": False, "compression": "none"},
                    {"data_page_version": "2.0", "compression": "gzip"}, {"row_group_size": 1}):  # fmt: skip
        made.append(_parquet(table, **options))
    for column, values in _LIES.items():
        for value in values:
            lying = pa.Table.from_pylist([first | {column: value}], schema=table.schema)
            made.append(_parquet(lying, use_dictionary=False, compression="none", write_statistics=False))
    return tuple(made)


_LIES: dict[str, list[Any]] = {
    "layer_name": [None, "", "x" * 5000],
    "shape": [None, [], [None], [0], [1 << 62, 1 << 62], [0, 1 << 63], [1] * 100, [256], [64, 4]],
    "dtype": [None, "F8_E4M3", "F4", "F6_E2M3", "BOOL", "X"],
    "num_params": [None, 0, (1 << 64) - 1],
    "quant_type": [None, "none", "nf4", "int3", "int8", "x"],
    "bit_width": [None, 0, 3, 255],
    "chunk_index": [None, 1, (1 << 32) - 1],
    "chunk_offset": [None, 1, 32, (1 << 64) - 1],
    "data": [None, b"", b"x", bytes(5000)],
    "scales": [None, b"", b"x", bytes(4)],
    "zero_points": [None, b"", b"x", bytes(4)],
    "scale_dtype": [None, "F16", "BF16", "F64"],
    "quant_axis": [None, 1, -1],
    "group_size": [None, 0, 16, 33, 128, (1 << 32) - 1],
    "modality": [None, "x"],
    "sha256": [None, "", "x" * 64, hashlib.sha256(b"").hexdigest()],
}


@cache
def calibrations() -> tuple[bytes, ...]:
    """Files of each kind, their kind's number before them."""
    x = _weights(6, 8)
    entries = {
        "timesteps": np.array([0, 500]),
        "a.gram": x.T @ x,
        "a.mean_square": x[:2] ** 2,
        "a.count": np.array([3, 0]),
        "b.samples": x.astype(np.float16),
        "b.sample_timestep": np.array([0, 500] * 3),
    }
    rows = [
        {"name": name, "dtype": dtype, "shape": list(array.shape), "data": array.tobytes()}
        for (name, array), dtype in zip(entries.items(), ("I64", "F32", "F32", "I64", "F16", "I64"), strict=True)
    ]
    schema = pa.schema(
        {"name": pa.string(), "dtype": pa.string(), "shape": pa.list_(pa.int64()), "data": pa.large_binary()}
    )
    tables = [pa.Table.from_pylist(rows, schema)]
    for column, values in _CALIBRATION_LIES.items():
        tables += [pa.Table.from_pylist([rows[0] | {column: value}, *rows[1:]], schema) for value in values]
    made = [b"\0" + save(entries, {"arrowquant.shared": '{"c": "a"}'}), b"\0" + save({"a.gram": x.T @ x})]
    made += [b"\1" + _parquet(table, use_dictionary=False, compression="none") for table in tables]
    return (*made, b"\2" + _imatrix())


_CALIBRATION_LIES: dict[str, list[Any]] = {
    "name": [None, "", "a.gram", "x.x"],
    "dtype": [None, "F4", "F32"],
    "shape": [None, [], [None], [-1], [1 << 62, 1 << 62], [0, 1 << 62]],
    "data": [None, b"", b"x"],
}


def _imatrix() -> bytes:
    """As llama.cpp writes them: of one layer, with a list of texts among its values."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    values = text("general.type") + struct.pack("<I", 8) + text("imatrix")
    values += text("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 1) + text("a.txt")
    values += text("imatrix.chunk_count") + struct.pack("<II", 4, 3)
    tensors = text("blk.0.attn_q.weight.in_sum2") + struct.pack("<IQQIQ", 2, 8, 1, 0, 0)
    tensors += text("blk.0.attn_q.weight.counts") + struct.pack("<IQQIQ", 2, 1, 1, 0, 32)
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 3) + values + tensors
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + np.arange(9, dtype=np.float32).tobytes()


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


@cache
def tables() -> tuple[bytes, ...]:
    """Arrow streams, each behind the number of the call that takes it: quantize, dequantize, compare."""
    return tuple(bytes([call]) + data for call, data in _streams())


def _streams() -> Iterator[tuple[int, bytes]]:
    x = _weights(2, 64).ravel()
    plain = pa.table({"layer_name": ["a", "b"], "weights": [x[:64], x[64:]], "shape": [[2, 32], None]})
    yield 0, _stream(plain)
    yield 0, _stream(pa.concat_tables([plain, plain]))
    yield 0, _stream(plain.set_column(1, "weights", plain["weights"].cast(pa.large_list(pa.float16()))))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(x), 64)
    yield 0, _stream(pa.table({"layer_name": pa.array(["a", "b"], pa.large_string()), "weights": fixed}))
    config = resolve(Profile.LOCAL, [QuantizationConfig(bit_width=4, group_size=32, method="minmax")])
    quantized = quantize_table(plain, config, Tools(ReferenceBackend(), 1 << 16, lambda: False))
    yield 1, _stream(quantized)
    for column, value in (("shape", [1 << 62, 1 << 62]), ("shape", [1 << 33]), ("group_size", 0), ("bit_width", 0),
                          ("scales", b"x"), ("data", b""), ("granularity", "tensor"), ("quant_type", "nf4"),
                          ("zero_points", None), ("scale_dtype", "F64")):  # fmt: skip
        rows = [row | {column: value} for row in quantized.to_pylist()]
        yield 1, _stream(pa.Table.from_pylist(rows, schema=quantized.schema))
    yield 2, _stream(pa.table({"layer_name": ["a"], "weights": [x], "other": [x * 0.9]}))
    yield 2, _stream(pa.table({"layer_name": pa.nulls(4), "weights": _empty_lists(4), "other": _empty_lists(4)}))
    yield 0, _stream(pa.table({"layer_name": pa.array(["a"]).dictionary_encode(), "weights": [x]}))
    yield 0, _compressed(plain)
    for call, columns in ((0, ("weights", "shape")), (1, ("data", "scales", "shape")), (2, ("other",))):
        for column in columns:
            for odd in _odd_arrays(2):
                table = (plain, quantized, plain.append_column("other", plain["weights"]).drop("shape"))[call]
                yield call, _stream(table.set_column(table.column_names.index(column), column, odd))


def _odd_arrays(count: int) -> Iterator[pa.Array]:
    """Columns of types that nobody should send."""
    yield pa.nulls(count)
    yield pa.array([[1.0, None]] * count, pa.list_(pa.float32()))
    yield pa.array([[[1.0]]] * count, pa.list_(pa.list_(pa.float32())))
    yield pa.array([[-1, 5]] * count, pa.list_(pa.int8()))
    yield pa.array([[1 << 62]] * count, pa.large_list(pa.uint64()))
    yield pa.array([[1.0]] * count, pa.list_view(pa.float32()))
    yield pa.array([b"x"] * count, pa.binary(1))
    yield pa.array([b"x"] * count, pa.binary_view())
    yield pa.array([{"a": 1}] * count)
    yield pa.array([[("a", 1)]] * count, pa.map_(pa.string(), pa.int32()))
    yield pa.RunEndEncodedArray.from_arrays(pa.array([count], pa.int32()), pa.array([1.0]))
    yield pa.UnionArray.from_sparse(pa.array([0] * count, pa.int8()), [pa.array([1.0] * count)])
    yield pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"] * count))


def _empty_lists(count: int) -> pa.Array:
    """Lists of no elements, of which a stream may claim any number."""
    return pa.Array.from_buffers(pa.list_(pa.float32(), 0), count, [None], children=[pa.array([], pa.float32())])


def _stream(table: pa.Table) -> bytes:
    return bytes(write_table(table))


def _compressed(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue()


def ranges() -> Sequence[bytes]:
    """Behind a byte that chooses the size."""
    texts = ("bytes=0-9", "bytes=5-", "bytes=-5", "bytes=0-0,2-3", "bytes = 1 - 2", f"bytes={10**18}-", "bytes=9-0")
    return [bytes([i]) + text.encode() for i in range(5) for text in texts]


def content_ranges() -> Sequence[bytes]:
    """Content-Length, a line's end, and the header."""
    return [b"100\nbytes 0-99/1000", b"0\nbytes */10", b"\nbytes 5-9/10", b"7\n", b"\n", b"100\nbytes 0-99/*"]


def tags() -> Sequence[bytes]:
    """Lists of entity tags."""
    return [b'"0123456789abcdef"', b'W/"0123456789abcdef", "b"', b"*", b'"a", "b,c"', b""]


def accepts() -> Sequence[bytes]:
    """`Accept` and `Prefer`."""
    return [b"text/event-stream;q=0.5, application/json", b"*/*;q=0", b"wait=5, respond-async", b'wait="60"', b"a/b"]


def event_ids() -> Sequence[bytes]:
    """Ids of events."""
    return [b"0", b"17", b"9223372036854775807", b"9223372036854775808", b"-1", b" 1", b"1_000", b"1.0", b"+1"]


def cursors() -> Sequence[bytes]:
    """Behind a byte that chooses the list."""
    uuid = b"01a20908-0071-7639-9314-c35c47769377"
    return [b"\0job_" + uuid, b"\1batch_" + uuid, b"\0batch_" + uuid, b"\0job_" + uuid + b"\n"]


def paths() -> Sequence[bytes]:
    """Names of the files of a model, a line each."""
    texts = ("model.safetensors", "a/b/c.json", "../x", "/etc/passwd", "a\\b", "a//b", "caf\u00e9", "cafe\u0301",
             "CON", "a.", "a \nb", "x\nX", "a\na/b", "\u202ex", "a" * 300, "a/" * 600 + "b", ".hidden")  # fmt: skip
    return [text.encode() for text in texts]


def addresses() -> Sequence[bytes]:
    """Addresses of models and targets; `@` stands for the root."""
    texts = ("file://@/m", "file://@/m/model.safetensors", "file:@/m", "file://localhost@/m", "file://@/out/secret",
             "file://@/m/../../outside/secret", "file://@/%2e%2e/outside", "file://@/up/outside", "file://@/round",
             "file://@/m/in/back/outside/secret", "FILE://@/m", "s3://bucket/m", "file://@/m%00", "file://@/new",
             "file://@/m/%2Fetc/passwd", "file:////etc/passwd", "file://@/m?x", "@/m", "file://@/out/new")  # fmt: skip
    return [text.encode() for text in texts]
