"""Reads outputs with the libraries that their users have, and none of our code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest

#: The levels of NF4, from the QLoRA paper.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip

Tensors = dict[str, np.ndarray]


def read_parquet(folder: Path) -> Tensors:
    """Every tensor of a Parquet output, dequantized to float32 with pyarrow and NumPy; copies as they are."""
    pieces: dict[str, list[np.ndarray]] = {}
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            assert row["sha256"] == hashlib.sha256(row["data"]).hexdigest(), row["layer_name"]
            assert row["chunk_index"] == len(pieces.setdefault(row["layer_name"], []))
            shapes[row["layer_name"]] = row["shape"]
            pieces[row["layer_name"]].append(_dequantize_row(row))
    return {name: np.concatenate(flat).reshape(shapes[name]) for name, flat in pieces.items()}


def _dequantize_row(row: Mapping[str, Any]) -> np.ndarray:
    if row["quant_type"] == "none":
        return np.frombuffer(row["data"], DTYPES[row["dtype"]])
    cols = int(np.prod(row["shape"][1:]))
    bits = np.unpackbits(np.frombuffer(row["data"], np.uint8), bitorder="little")
    width = row["bit_width"]
    count = len(bits) // width // cols * cols
    codes = (bits[: count * width].reshape(-1, width) << np.arange(width, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    codes = codes.reshape(-1, cols)
    scale = np.frombuffer(row["scales"], DTYPES[row["scale_dtype"]]).astype(np.float32)
    scale = _spread(scale, row, codes.shape)
    if row["quant_type"] == "nf4":
        return (NF4[codes] * scale).reshape(-1)
    zero: Any = 1 << (width - 1)
    if row["zero_points"]:
        zero = _spread(np.frombuffer(row["zero_points"], np.uint8), row, codes.shape).astype(np.float32)
    return ((codes.astype(np.float32) - zero) * scale).reshape(-1)


def _spread(values: np.ndarray, row: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """One value for each element, from one for each group."""
    if row["quant_axis"] is None:
        return np.broadcast_to(values.reshape(1, 1), shape)
    per_row = values.reshape(shape[0], -1)
    return np.repeat(per_row, row["group_size"] or shape[1], axis=1)[:, : shape[1]]


def read_compressed_tensors(folder: Path) -> Tensors:
    """Every tensor of a compressed-tensors output, decompressed to float32 by that library; copies as they are."""
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="install the extra `peers`")
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    stored = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    described = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    modules = {name.removesuffix("_scale").removesuffix(".weight") for name in stored if name.endswith(".weight_scale")}
    found: Tensors = {}
    for module in modules:
        group = _group_of(module, described["config_groups"])
        scheme = QuantizationScheme.model_validate({k: v for k, v in group.items() if v is not None})
        names = [n for n in stored if n.rpartition(".")[0] == module and n.rpartition(".")[2].startswith("weight")]
        state = {name.rpartition(".")[2]: stored.pop(name) for name in names}
        # The library computes in the dtype of the scales; in float32 its answer is the stored one, unrounded.
        state["weight_scale"] = state["weight_scale"].float()
        compressor = compressors.BaseCompressor.get_value_from_registry(group["format"])
        found[f"{module}.weight"] = compressor.decompress(state, scheme)["weight"].numpy()
        assert module not in described["ignore"], f"{module} is quantized and ignored at once"
    return found | {name: _numpy(tensor) for name, tensor in stored.items()}


def _group_of(module: str, groups: Mapping[str, Any]) -> dict[str, Any]:
    """The group that names the module, else that of all linear layers."""
    named = [group for group in groups.values() if module in group["targets"]]
    general = [group for group in groups.values() if "Linear" in group["targets"]]
    return dict((named or general)[0])


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())


def check_figures(output: Mapping[str, Any], originals: Tensors, found: Tensors) -> None:
    """Each tensor's figures in a report are those of the files; copies are copies to the bit."""
    assert found.keys() == originals.keys() == {t["name"] for t in output["tensors"]}
    for tensor in output["tensors"]:
        name = tensor["name"]
        if tensor["scheme"] == "none":
            assert found[name].dtype == originals[name].dtype
            assert found[name].tobytes() == originals[name].tobytes(), name
            continue
        x, y = originals[name].astype(np.float64).ravel(), found[name].astype(np.float64).ravel()
        assert tensor["cosine_similarity"] == pytest.approx(cosine(x, y), abs=1e-6), name
        assert tensor["max_abs_error"] == pytest.approx(np.abs(x - y).max(), rel=1e-4), name
        lost = (x - y) @ (x - y)
        expected = pytest.approx(10 * np.log10(x @ x / lost), abs=1e-3) if lost else None
        assert tensor.get("sqnr_db") == expected, name


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Cosine similarity in float64; 0 when one of them is all zero."""
    x, y = x.astype(np.float64).ravel(), y.astype(np.float64).ravel()
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm else 0.0
