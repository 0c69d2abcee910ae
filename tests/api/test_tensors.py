"""Tables of tensors over HTTP: Arrow in, Arrow out."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from service.engine.table_io import read_table, write_table
from tests.conftest import StartServer
from tests.server import Server

ARROW = "application/vnd.apache.arrow.stream"


def call(server: Server, verb: str, table: pa.Table | bytes, **parameters: Any) -> httpx.Response:
    content = table if isinstance(table, bytes) else bytes(write_table(table))
    headers = {"Content-Type": ARROW}
    return server.client.post(f"/v1/tensors:{verb}", content=content, headers=headers, params=parameters)


def answer(response: httpx.Response) -> pa.Table:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == ARROW
    return read_table(response.content)


def weights(*tensors: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "layer_name": [f"layer{i}" for i in range(len(tensors))],
            "weights": [t.reshape(-1) for t in tensors],
            "shape": [list(t.shape) for t in tensors],
        }
    )


def test_weights_come_back_nearly_as_they_went(server: Server, rng: np.random.Generator) -> None:
    tensors = [rng.standard_normal((32, 128), np.float32), rng.standard_normal((8, 4, 32), np.float32)]
    quantized = answer(call(server, "quantize", weights(*tensors), bit_width=8, group_size=32, method="mse"))
    assert quantized["quant_type"].to_pylist() == ["int8", "int8"]
    assert quantized["shape"].to_pylist() == [[32, 128], [8, 4, 32]]
    assert min(quantized["cosine_similarity"].to_pylist()) > 0.999
    back = answer(call(server, "dequantize", quantized))
    for original, row in zip(tensors, back.to_pylist(), strict=True):
        np.testing.assert_allclose(np.array(row["weights"]).reshape(row["shape"]), original, atol=0.05)

    both = pa.table(
        {"layer_name": back["layer_name"], "weights": weights(*tensors)["weights"], "other": back["weights"]}
    )
    compared = answer(call(server, "compare", both))
    np.testing.assert_allclose(
        compared["cosine_similarity"].to_numpy(), quantized["cosine_similarity"].to_numpy(), rtol=1e-6
    )


def test_parameters_are_those_of_a_configuration(server: Server) -> None:
    table = weights(np.linspace(-1, 1, 512, dtype=np.float32).reshape(4, 128))
    row = answer(call(server, "quantize", table)).to_pylist()[0]
    assert (row["bit_width"], row["group_size"], row["granularity"]) == (4, 128, "group")
    row = answer(call(server, "quantize", table, profile="edge", granularity="channel", symmetric="true")).to_pylist()[
        0
    ]
    assert (row["bit_width"], row["group_size"], row["zero_points"]) == (2, None, None)
    row = answer(call(server, "quantize", table, scheme="nf4", scale_dtype="F32", backend="reference")).to_pylist()[0]
    assert (row["quant_type"], row["scale_dtype"]) == ("nf4", "F32")


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"bit_width": 7}, "invalid_request"),
        ({"bit_width": "four"}, "invalid_request"),
        ({"bitwidth": 4}, "invalid_request"),
        ({"scheme": "nf4", "bit_width": 4}, "invalid_request"),
        ({"backend": "abacus"}, "invalid_config"),
    ],
)
def test_a_wrong_parameter_is_refused(server: Server, parameters: dict[str, Any], code: str) -> None:
    response = call(server, "quantize", weights(np.ones((2, 32), np.float32)), **parameters)
    assert (response.status_code, response.json()["code"]) == (422, code)


def test_a_nan_names_its_layer(server: Server) -> None:
    bad = np.ones((2, 32), np.float32)
    bad[1, 3] = np.nan
    response = call(server, "quantize", weights(np.ones((2, 32), np.float32), bad))
    assert (response.status_code, response.json()["code"]) == (422, "non_finite_weights")
    assert response.json()["tensor"] == "layer1"


def test_a_wrong_table_names_the_column(server: Server) -> None:
    response = call(server, "quantize", pa.table({"layer_name": ["a"], "weight": [[1.0]]}))
    assert (response.status_code, response.json()["code"]) == (422, "invalid_table")
    assert "'weights' is missing" in response.json()["detail"]


@pytest.mark.parametrize("content", [b"", b"not arrow", b"\xff" * 100])
def test_what_is_not_arrow_is_refused(server: Server, content: bytes) -> None:
    for verb in ("quantize", "dequantize", "compare"):
        response = call(server, verb, content)
        assert (response.status_code, response.json()["code"]) == (422, "invalid_table")


def test_another_type_is_refused(server: Server) -> None:
    response = server.client.post("/v1/tensors:quantize", json={})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


def test_an_empty_table_is_answered_with_one(server: Server) -> None:
    assert answer(call(server, "quantize", weights(np.ones((1, 1), np.float32)).slice(0, 0))).num_rows == 0


def test_tables_have_a_limit_of_their_own(start_server: StartServer) -> None:
    server = start_server(max_body_bytes=1024, max_table_bytes=1 << 16)
    table = weights(np.ones((64, 128), np.float32))
    assert call(server, "quantize", table).status_code == 200
    response = call(server, "quantize", weights(np.ones((128, 128), np.float32)))
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
    swollen = answer(call(server, "quantize", table, bit_width=2)).slice(0, 1)
    many = pa.concat_tables([swollen] * 9)
    response = call(server, "dequantize", many)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_table")


def test_a_table_arrives_whole_whether_or_not_its_length_is_told(server: Server, rng: np.random.Generator) -> None:
    content = bytes(write_table(weights(rng.standard_normal((700, 1000), np.float32))))
    pieces = (content[start : start + 300_007] for start in range(0, len(content), 300_007))
    headers = {"Content-Type": ARROW}
    untold = server.client.post("/v1/tensors:quantize?bit_width=8", content=pieces, headers=headers)
    assert untold.request.headers["Transfer-Encoding"] == "chunked"
    assert answer(call(server, "quantize", content, bit_width=8)).equals(answer(untold))
    back = answer(call(server, "dequantize", answer(untold)))
    sent, came = (table["weights"].combine_chunks().flatten().to_numpy() for table in (read_table(content), back))
    np.testing.assert_allclose(came, sent, atol=0.05)
