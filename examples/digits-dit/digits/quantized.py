"""Quantizes a model folder with the service's engine as a library, and reads the result back."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from digits.arrays import FloatArray
from service.engine.backends.registry import backends
from service.engine.calibration.opening import open_calibration
from service.engine.config import Profile, QuantizationConfig, resolve
from service.engine.formats.base import ModelReader
from service.engine.formats.registry import open_model
from service.engine.pipeline import quantize
from service.engine.plan import OutputSpec, make_plan

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """Weights as they read back, the layers that were quantized, and the bits of one of their weights, all counted."""

    weights: dict[str, FloatArray]
    layers: tuple[str, ...]
    bits_per_weight: float


def quantized(folder: Path, calibration: Path | None = None, **config: Any) -> QuantizedModel:
    """The model in `folder`, through the output format `parquet`; `config` and `calibration` as in a request."""
    resolved = resolve(Profile.LOCAL, [QuantizationConfig(min_accuracy=0.0, on_failure="warn", **config)])
    with ExitStack() as stack:
        work = stack.enter_context(TemporaryDirectory())
        reader = stack.enter_context(closing(open_model(folder)))
        known = None if calibration is None else stack.enter_context(closing(open_calibration(calibration)))
        plan = make_plan(reader, [OutputSpec("parquet", "parquet", resolved)], known)
        report = quantize(
            plan,
            reader,
            Path(work),
            backend=backends()["cpu"](threads=1),
            block_bytes=BLOCK_BYTES,
            report=lambda _: None,
            cancelled=lambda: False,
        ).outputs[0]
        with closing(open_model(Path(work) / "parquet")) as result:
            weights = read(result)
    done = tuple(t.name.removesuffix(".weight") for t in report.tensors if t.bits is not None)
    return QuantizedModel(weights, done, report.quality.bits_per_weight)


def read(model: ModelReader) -> dict[str, FloatArray]:
    """All tensors of an open model."""
    return {info.name: model.rows(info, 0, info.rows).reshape(info.shape) for info in model.tensors}
