"""What a run costs: a formula of a few rates, and how the rates follow from runs that were measured.

Seconds are those of the kernels on all cores, and beside them so many for the run, for each tensor that an output
copies and each that it quantizes, for each byte that is read and each that is written. Reading and writing go on beside
the kernels, but take cores from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

import numpy as np

from service.engine.backends.base import Backend, Grid
from service.engine.inputs import LayerInputs
from service.engine.low_rank import LowRank
from service.engine.methods.base import Method
from service.engine.plan import Plan
from service.engine.schemes.base import Scheme
from service.engine.tensors import FLOAT_DTYPES

SAMPLE_SHAPE = (256, 2048)
#: A kernel is timed for so long, and so often at least.
TIMED_S, RUNS = 0.1, 3


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do; tensors are counted in each output, `compute_s` is of kernels on all cores."""

    copied: int
    quantized: int
    read_bytes: int
    written_bytes: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds for a run, a tensor that an output copies, one that it quantizes, a byte read and a byte written."""

    run_s: float = 0.0
    copied_s: float = 0.0
    quantized_s: float = 0.0
    read_s: float = 0.0
    write_s: float = 0.0

    def seconds(self, work: Work) -> float:
        """How long the work takes."""
        moved_s = work.read_bytes * self.read_s + work.written_bytes * self.write_s
        tensors_s = work.copied * self.copied_s + work.quantized * self.quantized_s
        return self.run_s + tensors_s + moved_s + work.compute_s


def fit(measured: Sequence[tuple[Work, float]]) -> Rates:
    """The rates, none below zero, whose relative errors against these seconds are least in the sum of squares."""
    rows = np.array([(1, w.copied, w.quantized, w.read_bytes, w.written_bytes) for w, _ in measured], np.float64)
    seconds = np.array([s for _, s in measured])
    matrix, target = rows / seconds[:, None], 1 - np.array([w.compute_s for w, _ in measured]) / seconds
    used, rates = [0, 1, 2, 3, 4], np.zeros(5)
    while used:
        found = np.linalg.lstsq(matrix[:, used], target, rcond=None)[0]
        if (found >= 0).all():
            rates[used] = found
            break
        used.pop(int(np.argmin(found * matrix[:, used].max(axis=0))))
    return Rates(*rates.tolist())


def work_of(plan: Plan, backend: Backend) -> Work:
    """What a run of this plan has to do; the first call for a scheme and method times them on made-up weights."""
    compute_s = 0.0
    for tensor in plan.tensors:
        info, ways = tensor.info, {(d.scheme, d.method) for d in tensor.decisions}
        coded = [(s, m) for s, m in ways if s is not None and m is not None]
        compute_s += sum(info.size * seconds_per_weight(backend, s, m, info.dtype, tensor.is_fed) for s, m in coded)
    outputs = range(len(plan.outputs))
    written = sum(map(plan.predicted_bytes, outputs))
    quantized = sum(map(plan.quantized, outputs))
    return Work(len(plan.tensors) * len(outputs) - quantized, quantized, plan.source_bytes, written, compute_s)


@cache
def seconds_per_weight(backend: Backend, scheme: Scheme, method: Method, dtype: str, is_fed: bool = False) -> float:
    """How long the kernel takes for one element, on all cores, where the layer's inputs are known or not."""
    rank, method = method.low_rank, method.quantizes_as
    x = np.random.default_rng(0).standard_normal(SAMPLE_SHAPE, np.float32).astype(FLOAT_DTYPES[dtype])
    grid: Grid | None = None
    if scheme.takes_pass:
        grid = backend.tensor_grid(backend.observe(x), scheme, method)
    inputs = _made_up_inputs() if is_fed or method.needs else None
    if rank:
        low_rank = LowRank.of(x[:rank].astype(np.float16), inputs)
        return _median_time(lambda: low_rank.quantize(x, scheme, method, grid, backend)) / x.size
    return _median_time(lambda: backend.quantize(x, scheme, method, grid, inputs)) / x.size


def _made_up_inputs() -> LayerInputs:
    gram = np.eye(SAMPLE_SHAPE[1], dtype=np.float32)
    return LayerInputs(SAMPLE_SHAPE[1], gram=gram, absmax=np.ones(SAMPLE_SHAPE[1], np.float32))


def _median_time(work: Callable[[], object]) -> float:
    work()  # whatever is done once
    times: list[float] = []
    while len(times) < RUNS or sum(times) < TIMED_S:
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return median(times)
