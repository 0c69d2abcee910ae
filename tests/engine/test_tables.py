"""Tables of tensors: quantized, dequantized and compared as the engine does it, and refused with reason."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.backends.reference import ReferenceBackend
from service.engine.config import Profile, QuantizationConfig, ResolvedConfig, build, resolve
from service.engine.methods.registry import methods
from service.engine.packing import unpack_flat
from service.engine.table_io import float_lists, read_table, write_table
from service.engine.tables import QUANTIZED, WEIGHTS, Tools, compare_table, dequantize_table, quantize_table
from service.errors import Cancelled, InvalidTable, NonFiniteWeights

TOOLS = Tools(ReferenceBackend(), block_bytes=1 << 12, cancelled=lambda: False)
MAX_BYTES = 1 << 26


def config(**fields: Any) -> ResolvedConfig:
    return resolve(Profile.LOCAL, [QuantizationConfig(method="minmax"), QuantizationConfig(**fields)])


def table(*tensors: np.ndarray, list_type: Any = None, shapes: bool = True) -> pa.Table:
    """A table of tensors by position."""
    type_ = list_type or pa.list_(pa.from_numpy_dtype(tensors[0].dtype))
    columns = {
        "layer_name": pa.array([f"layer{i}" for i in range(len(tensors))]),
        "weights": pa.array([t.reshape(-1) for t in tensors], type_),
    }
    if shapes:
        columns["shape"] = pa.array([list(t.shape) for t in tensors], pa.list_(pa.int32()))
    return pa.table(columns)


def over_the_wire(value: pa.Table) -> pa.Table:
    return read_table(write_table(value))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 300),
    scheme=st.sampled_from(["int2", "int3", "int4", "int5", "int6", "int8", "nf4", "int3_nested", "int4_nested"]),
    symmetric=st.booleans(),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    seed=st.integers(0, 1 << 32),
)
def test_a_table_holds_what_the_backend_computes(
    rows: int, cols: int, scheme: str, symmetric: bool, granularity: str, seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, cols), np.float32)
    fields = {} if scheme == "nf4" or scheme.endswith("_nested") else {"symmetric": symmetric}
    granularity = "group" if scheme.endswith("_nested") else granularity
    chosen = config(scheme=scheme, granularity=granularity, **fields)
    quantized = over_the_wire(quantize_table(over_the_wire(table(x)), chosen, TOOLS))
    back = dequantize_table(quantized, TOOLS, MAX_BYTES)

    built, backend = build(chosen, "F32"), TOOLS.backend
    grid = backend.tensor_grid(backend.observe(x), built, methods()["minmax"]()) if granularity == "tensor" else None
    expected = backend.quantize(x, built, methods()["minmax"](), grid)
    np.testing.assert_array_equal(
        np.array(back["weights"][0].as_py(), np.float32), backend.dequantize(expected).ravel()
    )
    assert back["shape"].to_pylist() == [[rows, cols]]
    row = quantized.to_pylist()[0]
    assert row["cosine_similarity"] == pytest.approx(expected.errors.cosine_similarity)
    assert len(row["data"]) == -(-rows * cols * built.bits // 8)


def test_the_data_is_a_flat_stream_that_ten_lines_can_read() -> None:
    x = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    row = quantize_table(table(x), config(bit_width=3, group_size=16), TOOLS).to_pylist()[0]
    codes = unpack_flat(row["data"], 3, 120).reshape(3, 40).astype(np.float32)
    scales = np.frombuffer(row["scales"], np.float16).astype(np.float32).reshape(3, 3)
    zeros = np.frombuffer(row["zero_points"], np.uint8).astype(np.float32).reshape(3, 3)
    by_column = np.arange(40) // 16
    decoded = (codes - zeros[:, by_column]) * scales[:, by_column]
    assert float(np.abs(decoded - x).max()) == pytest.approx(row["max_abs_error"], rel=1e-6)
    assert (row["quant_type"], row["bit_width"], row["group_size"]) == ("int3", 3, 16)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
def test_every_kind_of_list_of_floats_is_taken(dtype: Any, kind: str) -> None:
    value = pa.from_numpy_dtype(dtype)
    types = {"list": pa.list_(value), "large_list": pa.large_list(value), "fixed_size_list": pa.list_(value, 32)}
    x = np.linspace(-1, 1, 64).astype(dtype).reshape(2, 32)
    asked = table(x[0], x[1], list_type=types[kind])
    rows = quantize_table(over_the_wire(asked), config(), TOOLS).to_pylist()
    assert [r["dtype"] for r in rows] == [{2: "F16", 4: "F32", 8: "F64"}[x.itemsize]] * 2
    assert rows == quantize_table(over_the_wire(table(x[0], x[1])), config(), TOOLS).to_pylist()


def test_weights_are_worked_on_where_they_arrived() -> None:
    body = bytearray(write_table(table(*np.ones((3, 8, 64), np.float32))))
    arrived = np.frombuffer(body, np.uint8)
    rows = float_lists(read_table(memoryview(body)), "weights")
    assert [row.size for row in rows] == [512] * 3
    assert all(np.shares_memory(row, arrived) for row in rows)


def test_a_tensor_without_a_shape_is_one_row() -> None:
    x = np.linspace(-1, 1, 100, dtype=np.float32)
    row = quantize_table(table(x, shapes=False), config(granularity="channel"), TOOLS).to_pylist()[0]
    assert row["shape"] == [100]
    assert len(row["scales"]) == 2


def test_an_empty_table_and_an_empty_tensor_come_back_as_such() -> None:
    nothing = table(np.empty(0, np.float32)).slice(0, 0)
    assert quantize_table(over_the_wire(nothing), config(), TOOLS) == QUANTIZED.empty_table()
    empty = quantize_table(table(np.empty((0, 7), np.float32)), config(), TOOLS)
    assert empty["data"].to_pylist() == [b""]
    back = dequantize_table(over_the_wire(empty), TOOLS, MAX_BYTES)
    assert back.to_pylist() == [{"layer_name": "layer0", "weights": [], "shape": [0, 7]}]
    assert back.schema == WEIGHTS


def test_a_constant_tensor_is_exact() -> None:
    quantized = quantize_table(table(np.zeros((4, 64), np.float32)), config(), TOOLS)
    assert quantized["cosine_similarity"].to_pylist() == [1.0]
    assert quantized["sqnr_db"].to_pylist() == [None]


def test_two_columns_are_compared() -> None:
    x, y = np.array([3.0, 4.0], np.float32), np.array([3.0, 4.0])
    asked = pa.table({"layer_name": ["a", "b"], "weights": [x, x], "other": [y, -y]})
    first, second = compare_table(over_the_wire(asked), TOOLS).to_pylist()
    assert (first["cosine_similarity"], first["sqnr_db"], first["relative_error"]) == (1.0, None, 0.0)
    assert (second["cosine_similarity"], second["relative_error"]) == (-1.0, 2.0)
    assert second["count"] == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("granularity", ["group", "tensor"])
def test_what_is_not_finite_is_refused_by_name(value: float, granularity: str) -> None:
    good, bad = np.ones(64, np.float32), np.ones(64, np.float32)
    bad[63] = value
    with pytest.raises(NonFiniteWeights, match="layer1") as caught:
        quantize_table(table(good, bad), config(granularity=granularity), TOOLS)
    assert caught.value.tensor == "layer1"
    with pytest.raises(NonFiniteWeights, match="layer0"):
        compare_table(pa.table({"layer_name": ["layer0"], "weights": [good], "other": [bad]}), TOOLS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"layer_name": ["a"]}, "'weights' is missing"),
        ({"layer_name": ["a"], "weights": [[1.0]], "shapes": [[1]]}, "'shapes' is not known"),
        ({"layer_name": [1], "weights": [[1.0]]}, "'layer_name' has the type int64"),
        ({"layer_name": ["a"], "weights": [1.0]}, "'weights' has the type double"),
        ({"layer_name": ["a"], "weights": [[1]]}, "a list of float16, float32 or float64"),
        ({"layer_name": ["a", None], "weights": [[1.0], [1.0]]}, "'layer_name', row 1: is null"),
        ({"layer_name": ["a", "b"], "weights": [[1.0], None]}, "'weights', row 1: is null"),
        ({"layer_name": ["a", "b"], "weights": [[1.0], [1.0, None]]}, "'weights', row 1: element 1 is null"),
        ({"layer_name": ["a"], "weights": [[1.0]], "shape": [[-1, -1]]}, "'shape', row 0"),
        ({"layer_name": ["a"], "weights": [[1.0]], "shape": [[2, 3]]}, r"row 0 \(a\): 'shape' is \[2, 3\]"),
        ({"layer_name": ["a"], "weights": [[1.0]], "shape": [["1"]]}, "a list of integers"),
    ],
)
def test_a_wrong_table_names_column_and_row(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidTable, match=message):
        quantize_table(over_the_wire(pa.table(columns)), config(), TOOLS)


def test_a_column_that_is_there_twice_is_refused() -> None:
    x = pa.array([[1.0]])
    twice = pa.Table.from_arrays([pa.array(["a"]), x, x], names=["layer_name", "weights", "weights"])
    with pytest.raises(InvalidTable, match="2 times"):
        quantize_table(twice, config(), TOOLS)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data", b"", "'data' has 0 bytes"),
        ("data", None, "'data' is null"),
        ("scales", b"12", "'scales' has 2 bytes"),
        ("zero_points", b"1", "'zero_points' has 1 bytes"),
        ("shape", [1 << 60, 1 << 60], "'data' has"),
        ("shape", None, "'shape' is null"),
        ("quant_type", "int7", "'quant_type' is 'int7'"),
        ("granularity", "row", "do not make a scheme"),
        ("group_size", 17, "do not make a scheme"),
        ("group_size", None, "'group_size' is null"),
        ("scale_dtype", "F64", "do not make a scheme"),
        ("bit_width", 5, "'bit_width' is 5"),
    ],
)
def test_a_quantized_table_that_contradicts_itself_is_refused(field: str, value: Any, message: str) -> None:
    rows = quantize_table(table(np.ones((4, 64), np.float32)), config(), TOOLS).to_pylist()
    changed = pa.Table.from_pylist([rows[0] | {field: value}], schema=QUANTIZED)
    with pytest.raises(InvalidTable, match=message):
        dequantize_table(over_the_wire(changed), TOOLS, MAX_BYTES)


def test_more_weights_than_allowed_are_not_unpacked() -> None:
    quantized = quantize_table(table(np.ones((4, 64), np.float32)), config(), TOOLS)
    with pytest.raises(InvalidTable, match="split the table"):
        dequantize_table(quantized, TOOLS, 1023)


def test_work_stops_between_blocks() -> None:
    asked = iter([False, False, True])
    tools = Tools(ReferenceBackend(), 1 << 12, lambda: next(asked))
    with pytest.raises(Cancelled):
        quantize_table(table(np.ones((64, 64), np.float32)), config(), tools)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_compressed_stream_is_refused_before_it_is_unpacked(compression: str) -> None:
    sink = pa.BufferOutputStream()
    asked = table(np.zeros(1 << 16, np.float32))
    with pa.ipc.new_stream(sink, asked.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(asked)
    with pytest.raises(InvalidTable, match="compressed"):
        read_table(memoryview(sink.getvalue()))


def test_a_dictionary_is_refused() -> None:
    with pytest.raises(InvalidTable, match="dictionary"):
        over_the_wire(pa.table({"layer_name": pa.array(["a"]).dictionary_encode(), "weights": [[1.0]]}))


@pytest.mark.parametrize("column", ["layer_name", "weights"])
def test_a_dictionary_that_never_comes_is_refused_as_well(column: str) -> None:
    fields = {"layer_name": pa.string(), "weights": pa.list_(pa.float32())} | {
        column: pa.dictionary(pa.int32(), pa.null())
    }
    sink = pa.BufferOutputStream()
    pa.ipc.new_stream(sink, pa.schema(fields)).close()
    with pytest.raises(InvalidTable, match=f"column '{column}' has the type dictionary"):
        quantize_table(read_table(memoryview(sink.getvalue())), config(), TOOLS)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damaged_stream_does_more_than_be_refused(data: st.DataObject) -> None:
    stream = bytearray(write_table(table(np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32))))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(stream)))
    with suppress(InvalidTable, NonFiniteWeights):
        quantize_table(read_table(bytes(stream[:end])), config(), TOOLS)
