"""Real calibrations of small models: inputs of layers, and the files that hold what is measured of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

Arrays = Mapping[str, np.ndarray]


def samples(count: int, cols: int, seed: int = 1) -> np.ndarray:
    """Inputs (count, cols) whose columns differ in size and go together."""
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(0.0, 1.0, cols)
    return ((rng.standard_normal((count, cols)) + rng.standard_normal((count, 1))) * sizes).astype(np.float32)


def gram(fed: np.ndarray) -> np.ndarray:
    """E[x xᵀ] of inputs (n, cols)."""
    return (fed.T.astype(np.float64) @ fed / len(fed)).astype(np.float32)


def save_safetensors(path: Path, entries: Arrays, shared: Mapping[str, str] | None = None) -> Path:
    """Write a calibration with the safetensors library itself."""
    metadata = {"arrowquant.shared": json.dumps(shared)} if shared else None
    save_file({name: np.ascontiguousarray(array) for name, array in entries.items()}, path, metadata)
    return path


def save_parquet(path: Path, entries: Arrays, shared: Mapping[str, str] | None = None) -> Path:
    """Write a calibration with pyarrow."""
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32"}
    rows = [
        {"name": name, "dtype": names[array.dtype.name], "shape": list(array.shape), "data": array.tobytes()}
        for name, array in entries.items()
    ]
    schema = pa.schema(
        [("name", pa.string()), ("dtype", pa.string()), ("shape", pa.list_(pa.int64())), ("data", pa.large_binary())],
        metadata={"arrowquant.shared": json.dumps(shared)} if shared else None,
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=2, compression="none", use_dictionary=False)
    return path
