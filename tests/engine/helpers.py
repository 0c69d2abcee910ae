"""Small real models, and a run of the engine over them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from service.engine.backends.base import Backend
from service.engine.backends.reference import ReferenceBackend
from service.engine.calibration.opening import open_calibration
from service.engine.config import Profile, QuantizationConfig, resolve
from service.engine.formats.registry import open_model
from service.engine.pipeline import quantize
from service.engine.plan import OutputSpec, make_plan
from service.engine.progress import Happening
from service.engine.report import RunReport


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write tensors with the safetensors library itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, {"format": "pt"})
    return path


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Normal weights of a fixed seed, scaled as trained ones are."""
    return (np.random.default_rng(seed).standard_normal(shape, np.float32) * 0.05).astype(dtype)


def save_folder(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None) -> Path:
    """A model folder as hubs have them: config, tokenizer, weights."""
    save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "bert"}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def specs(*formats: str, options: dict[str, Any] | None = None, **config: Any) -> list[OutputSpec]:
    """One output per format, all with the same configuration on top of the profile `local`."""
    resolved = resolve(Profile.LOCAL, [QuantizationConfig(**({"method": "minmax"} | config))])
    return [OutputSpec(f, f, resolved, options or {}) for f in formats]


def run(
    source: Path,
    work: Path,
    outputs: list[OutputSpec],
    *,
    backend: Backend | None = None,
    block_bytes: int = 1 << 20,
    happenings: list[Happening] | None = None,
    cancelled: Any = lambda: False,
    calibration: Path | None = None,
) -> RunReport:
    """Quantize a model into `work`."""
    seen = happenings if happenings is not None else []
    with ExitStack() as stack:
        reader = stack.enter_context(closing(open_model(source)))
        fed = stack.enter_context(closing(open_calibration(calibration))) if calibration is not None else None
        plan = make_plan(reader, outputs, fed)
        return quantize(
            plan,
            reader,
            work,
            backend=backend or ReferenceBackend(),
            block_bytes=block_bytes,
            report=seen.append,
            cancelled=cancelled,
        )


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
