"""Small real models on disk, and requests that name them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from safetensors.numpy import save_file

from service.jobs.request import JobRequest, QuantizeRequest

SEED = 20261123
_REQUEST: TypeAdapter[JobRequest] = TypeAdapter(JobRequest)


def make_model(path: Path, *, tensors: int = 4, rows: int = 64, cols: int = 128) -> Path:
    """A safetensors file of normal weights, the same bytes each time."""
    rng = np.random.default_rng(SEED)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"layers.{i}.weight": rng.standard_normal((rows, cols), np.float32) for i in range(tensors)}, path)
    return path


def make_slow_model(path: Path) -> Path:
    """One tensor that `method: mse` of the reference backend needs seconds for."""
    return make_model(path, tensors=1, rows=8192, cols=1024)


def make_long_model(path: Path) -> Path:
    """Many tensors that together take `method: mse` of the reference backend seconds."""
    return make_model(path, tensors=40, rows=64, cols=512)


def quantize_request(source: Path | dict[str, Any], **fields: Any) -> QuantizeRequest:
    """A request to quantize, by default with one output in compressed-tensors."""
    where = source if isinstance(source, dict) else {"type": "uri", "uri": source.as_uri()}
    body = {"kind": "quantize", "source": where, "outputs": [{"format": "compressed-tensors"}]} | fields
    request = _REQUEST.validate_python(body)
    assert isinstance(request, QuantizeRequest)
    return request


def validate_request(original: Path, job_id: str, **fields: Any) -> JobRequest:
    """A request to compare a model with the output of a job."""
    body = {
        "kind": "validate",
        "original": {"type": "uri", "uri": original.as_uri()},
        "quantized": {"type": "job", "job_id": job_id},
    }
    return _REQUEST.validate_python(body | fields)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def files_below(folder: Path) -> list[str]:
    """Every file and folder below one, hidden ones included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
