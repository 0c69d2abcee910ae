"""What a plan will cost, from rates measured here on blocks of made-up weights."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from service.engine.backends.base import Backend, Grid
from service.engine.memory_need import need_to_quantize
from service.engine.methods.base import Method
from service.engine.plan import Decision, Plan
from service.engine.schemes.base import Scheme
from service.engine.tensors import FLOAT_DTYPES, TensorInfo

SAMPLE_SHAPE = (256, 2048)
RUNS = 3


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of arithmetic and hashing, disk time left out; peak memory above the idle service."""

    seconds: float
    memory_bytes: int


def estimate(plan: Plan, backend: Backend, block_bytes: int) -> Estimate:
    """Predict a run of this plan; the first call for a scheme and method times them."""
    seconds = 0.0
    for tensor in plan.tensors:
        info, ways = tensor.info, {(d.scheme, d.method) for d in tensor.decisions}
        coded = [(s, m) for s, m in ways if s is not None and m is not None]
        seconds += sum(info.size * _seconds_per_weight(backend, s, m, info.dtype) for s, m in coded)
    written = sum(plan.predicted_bytes(index) for index in range(len(plan.outputs)))
    memory = need_to_quantize(plan, block_bytes).nbytes
    return Estimate(seconds + written * _hash_seconds_per_byte(), memory)


def describe(plan: Plan, backend: Backend, block_bytes: int) -> dict[str, Any]:
    """The plan and its cost as JSON: each tensor with a decision and the rule behind it for each output."""
    return {
        "modality": plan.layout.modality,
        "is_diffusion_model": plan.layout.is_diffusion,
        "backend": backend.id,
        "source_bytes": plan.source_bytes,
        "predicted": asdict(estimate(plan, backend, block_bytes)),
        "notes": [*plan.layout.warnings, *(notice.text for notice in plan.warnings), *plan.notes],
        "outputs": [
            {
                "name": output.name,
                "format": output.format.id,
                "predicted_bytes": plan.predicted_bytes(index),
                "config": output.config.model_dump(mode="json", exclude_none=True),
                "tensors": [_row(t.info, t.decisions[index]) for t in plan.tensors],
            }
            for index, output in enumerate(plan.outputs)
        ],
    }


def _row(info: TensorInfo, decision: Decision) -> dict[str, Any]:
    scheme, method = decision.scheme, decision.method
    row: dict[str, Any] = {
        "name": info.name,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "scheme": scheme.id if scheme else "none",
        "rule": decision.rule,
        "original_bytes": info.nbytes,
        "predicted_bytes": scheme.stored_bytes(info.rows, info.cols) if scheme else info.nbytes,
    }
    if scheme and method:
        row |= {"method": method.id, "bit_width": scheme.bits, "granularity": scheme.granularity}
        row |= {"symmetric": scheme.symmetric, "scale_dtype": scheme.scale_dtype}
        row |= {"group_size": scheme.group_size} if scheme.granularity == "group" else {}
    return row


@cache
def _seconds_per_weight(backend: Backend, scheme: Scheme, method: Method, dtype: str) -> float:
    x = np.random.default_rng(0).standard_normal(SAMPLE_SHAPE, np.float32).astype(FLOAT_DTYPES[dtype])
    grid: Grid | None = None
    if scheme.granularity == "tensor":
        grid = backend.tensor_grid(backend.observe(x), scheme, method)
    return _best_time(lambda: backend.quantize(x, scheme, method, grid)) / x.size


@cache
def _hash_seconds_per_byte() -> float:
    data = bytes(1 << 20)
    return _best_time(lambda: hashlib.sha256(data).digest()) / len(data)


def _best_time(work: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)
