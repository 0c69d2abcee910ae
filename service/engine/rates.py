"""The rates of this machine, from runs of small made-up models through all of the engine."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np

from service.engine.backends.base import Backend
from service.engine.config import Profile, QuantizationConfig, resolve
from service.engine.cost_model import Rates, Work, fit, work_of
from service.engine.formats.registry import open_model
from service.engine.formats.safetensors_header import build_header
from service.engine.pipeline import quantize
from service.engine.plan import OutputSpec, make_plan
from service.storage.faults import storage_faults

#: Tensors of a model, the shape of each, and whether they are copied: one and many small ones tell what a run and a
#: tensor cost, a few large ones what bytes do.
_SMALL, _TINY, _LARGE = (64, 128), (8, 128), (1024, 2048)
_RUNS = (
    (1, _SMALL, False),
    (500, _SMALL, False),
    (1500, _TINY, True),
    (4, _LARGE, False),
    (4, _LARGE, True),
)
REPEATS = 2
HEADER_BYTES = 4096 + 120 * 1500


@cache
def rates(backend: Backend, format_id: str, block_bytes: int, folder: Path) -> Rates:
    """What an output in this format costs beside the kernels; the first call writes some 90 MB below `folder`.

    Raises DiskFull or StorageFailure where it cannot.
    """
    with storage_faults("measuring this machine"), tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder) as name:
        return fit([_run(Path(name), backend, format_id, block_bytes, *kind) for kind in _RUNS])


def _run(
    folder: Path, backend: Backend, format_id: str, block_bytes: int, count: int, shape: tuple[int, int], copied: bool
) -> tuple[Work, float]:
    """What a run had to do, and the seconds that it took."""
    source = folder / "model.safetensors"
    _write(source, count, shape)
    wanted = QuantizationConfig(bit_width=4, method="minmax", min_accuracy=0.0, skip=["*"] if copied else None)
    output = OutputSpec("out", format_id, resolve(Profile.LOCAL, [wanted]))
    times = []
    for index in range(REPEATS):
        begun = time.perf_counter()
        with closing(open_model(source)) as reader:
            plan = make_plan(reader, [output])
            quantize(
                plan,
                reader,
                folder / f"work-{count}-{copied}-{index}",
                backend=backend,
                block_bytes=block_bytes,
                report=lambda _: None,
                cancelled=lambda: False,
            )
        times.append(time.perf_counter() - begun)
    return work_of(plan, backend), min(times)


def _write(path: Path, count: int, shape: tuple[int, int]) -> None:
    weights = np.random.default_rng(0).standard_normal(shape, np.float32)
    size = weights.nbytes
    entries = [(f"blocks.{i}.weight", "F32", shape, i * size, (i + 1) * size) for i in range(count)]
    with path.open("wb") as file:
        file.write(build_header(entries, {"format": "pt"}, HEADER_BYTES))
        for _ in range(count):
            file.write(weights.data)
