"""An open calibration: which layers it has, what it knows of each, and whether that fits the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.engine.calibration.entries import CalibrationFile, Entry
from service.engine.calibration.gguf_names import gguf_name
from service.engine.tensors import TensorInfo
from service.engine.timesteps import Floats
from service.errors import InvalidCalibration

#: The name of the entry that is no layer's.
TIMESTEPS = "timesteps"
#: What may be known of a layer. Of `count` nothing but zeros is heeded: steps at which the layer was not fed.
FIELDS = ("gram", "mean_square", "absmax", "range", "count", "samples", "sample_timestep")
#: What is told of a layer beside fields of `LayerInputs`: the range of its inputs at each timestep, and what becomes of
#: it when each column is divided by a scale.
RANGE, DIVIDED_RANGE = "range", "divided_range"
#: Steps of a schedule; each layer may have a line for each.
MAX_TIMESTEPS = 1 << 16
#: Inputs of a layer whose Gram matrix is made of samples: that of more has over a gigabyte.
MOST_GRAM_COLUMNS = 1 << 14


@dataclass(frozen=True, slots=True)
class Layer:
    """What is known of a layer, by field; `name` is the one by which its file has it."""

    name: str
    fields: Mapping[str, Entry]

    @property
    def tells(self) -> frozenset[str]:
        """The fields of `LayerInputs` that it leads to, RANGE, and DIVIDED_RANGE."""
        found = {field for field in ("gram", "mean_square", "absmax") if field in self.fields}
        if RANGE in self.fields:
            found |= {RANGE, DIVIDED_RANGE} if "absmax" in self.fields else {RANGE}
        if "samples" in self.fields:
            found |= {"mean_square", "absmax"}
            found |= {"gram"} if self.fields["samples"].shape[-1] <= MOST_GRAM_COLUMNS else set()
        return frozenset(found | {"mean_square"} if "gram" in found else found)


class Calibration:
    """The layers of a file; those that share their inputs are each there by their own name."""

    def __init__(self, file: CalibrationFile, identity: Iterable[int | str]) -> None:
        """`identity` is that of the file; raises InvalidCalibration for what is no calibration."""
        self.file = file
        self._identity = [*identity]
        self._layers = _layers(file)
        self.timesteps = _timesteps(file)

    @property
    def identity(self) -> list[int | str]:
        """What has to be the same for a run to go on from what another did with it."""
        return [*self._identity, hashlib.sha256(self.file.header).hexdigest()]

    def layer(self, info: TensorInfo) -> Layer | None:
        """What is known of the layer whose weights a tensor is; raises InvalidCalibration where it cannot be its."""
        name = self._name(info)
        if name is None:
            return None
        layer = self._layers[name]
        for field, expected in _shapes(info.cols, len(self.timesteps), layer).items():
            found = layer.fields[field].shape
            if found != expected:
                raise InvalidCalibration(
                    f"{layer.name}.{field} has the shape {_shown(found)}, and {info.name} of shape {_shown(info.shape)}"
                    f" with {len(self.timesteps)} timesteps wants {_shown(expected)}: calibrate this very model",
                    tensor=info.name,
                    pointer="/calibration",
                )
        return layer

    def unmatched(self, tensors: Iterable[TensorInfo]) -> list[str]:
        """Layers that are those of no tensor, by name."""
        matched = {self._name(info) for info in tensors}
        return sorted(self._layers.keys() - matched)

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()

    def _name(self, info: TensorInfo) -> str | None:
        own = info.name.removesuffix(".weight")
        if own in self._layers:
            return own
        other = gguf_name(own) if self.file.has_gguf_names and info.name.endswith(".weight") else None
        return other if other in self._layers else None


def _layers(file: CalibrationFile) -> dict[str, Layer]:
    fields: dict[str, dict[str, Entry]] = {}
    for name, entry in file.entries.items():
        layer, _, field = name.rpartition(".")
        if layer and field in FIELDS:
            fields.setdefault(layer, {})[field] = entry
        elif name != TIMESTEPS:
            known = ", ".join(f"<layer>.{known}" for known in FIELDS)
            raise InvalidCalibration(f"entry {name!r:.200} of {file.source.name} is none of {TIMESTEPS}, {known}")
    layers = {name: Layer(name, entries) for name, entries in fields.items()}
    for name, other in file.shared.items():
        if other not in fields or name in fields:
            what = "has entries of its own" if name in fields else "there is no such layer"
            raise InvalidCalibration(f"layer {name!r:.200} is to share the inputs of {other!r:.200}, but {what}")
        layers[name] = layers[other]
    if not layers:
        raise InvalidCalibration(f"{file.source.name} has no layers")
    return layers


def _timesteps(file: CalibrationFile) -> Floats:
    """Their numbers, (T,); a single one of 0 where the file tells none."""
    entry = file.entries.get(TIMESTEPS)
    if entry is None:
        return np.zeros(1)
    if len(entry.shape) != 1 or not 0 < entry.rows <= MAX_TIMESTEPS:
        raise InvalidCalibration(
            f"{TIMESTEPS} has the shape {_shown(entry.shape)}; it is a list of up to {MAX_TIMESTEPS}"
        )
    steps: Floats = file.whole(entry).astype(np.float64)
    if not np.isfinite(steps).all() or len(np.unique(steps)) < len(steps):
        raise InvalidCalibration(f"{TIMESTEPS} holds a NaN, an infinity, or a step twice")
    return steps


def _shapes(cols: int, steps: int, layer: Layer) -> dict[str, tuple[Any, ...]]:
    """Those that the fields of a layer should have."""
    expected: dict[str, tuple[Any, ...]] = {
        "gram": (cols, cols),
        "mean_square": (steps, cols),
        "absmax": (steps, cols),
        "range": (steps, 2),
        "count": (steps,),
    }
    if (samples := layer.fields.get("samples")) is not None:
        expected |= {"samples": (samples.rows, cols), "sample_timestep": (samples.rows,)}
    elif "sample_timestep" in layer.fields:
        raise InvalidCalibration(f"{layer.name}.sample_timestep is there without {layer.name}.samples")
    return {field: shape for field, shape in expected.items() if field in layer.fields}


def _shown(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
