"""Collects calibration for ArrowQuant from any PyTorch model: statistics of what its layers are fed, by forward hooks.

    model = transformers.AutoModel.from_pretrained(folder)
    with Collector(model) as collector:
        for batch in batches:                     # some hundred sentences, or images: what the model is for
            model(**batch)
    collector.save("calibration.safetensors")

    with Collector(pipeline.transformer, timestep=timestep_of) as collector:       # a diffusers pipeline
        pipeline("a lighthouse at dawn", num_inference_steps=30)

Then `arrowquant quantize MODEL --calibration calibration.safetensors --method auto --out OUT`. Layers are named as in
the model that is given, which has to be how its file names them; else give a `prefix`. Memory is bounded: of each layer
a matrix of its inputs squared where these are no more than `most_gram_inputs`, and for each timestep two lines of them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Step:
    """What a layer was fed at a timestep: (inputs,) each, but for the range of all and the number of samples."""

    square: Tensor
    largest: Tensor
    low: float = 0.0
    high: float = 0.0
    count: int = 0


@dataclass
class Statistics:
    """Of one layer: steps by their numbers, and the sum of x xᵀ, or None where a layer has too many inputs."""

    gram: Tensor | None
    steps: dict[float, Step] = field(default_factory=dict)


def timestep_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The timestep of a call as diffusers makes it: by name, or behind the sample; one for the whole batch."""
    given = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return float(given.flatten()[0] if isinstance(given, Tensor) else given)


class Collector:
    """Watches the linear and convolution layers of a model for as long as its block is open."""

    def __init__(
        self,
        model: nn.Module,
        *,
        timestep: Callable[[tuple[Any, ...], dict[str, Any]], float] = lambda args, kwargs: 0.0,  # noqa: ARG005
        prefix: str = "",
        most_gram_inputs: int = 4096,
    ) -> None:
        """`timestep` finds that of a call of the model; `prefix` is put before the names of its layers."""
        self._model, self._timestep_of, self._prefix, self._most = model, timestep, prefix, most_gram_inputs
        self._statistics: dict[str, Statistics] = {}
        self._shared: dict[str, str] = {}
        self._timestep = 0.0
        self._last: tuple[str, Tensor] | None = None  # the layer before and its input, held so that it stays itself
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, layer in self._model.named_modules():
            if isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
                self._hooks.append(layer.register_forward_pre_hook(partial(self._fed, f"{self._prefix}{name}")))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = None

    def save(self, path: str | Path) -> None:
        """Write all that was collected."""
        numbers = sorted({number for statistics in self._statistics.values() for number in statistics.steps})
        entries: dict[str, Tensor] = {"timesteps": torch.tensor(numbers, dtype=torch.float64)}
        for name, statistics in self._statistics.items():
            empty = Step(*[torch.zeros_like(next(iter(statistics.steps.values())).square)] * 2)
            steps = [statistics.steps.get(number, empty) for number in numbers]
            counts = torch.tensor([step.count for step in steps])
            if statistics.gram is not None:
                entries[f"{name}.gram"] = statistics.gram / counts.sum()
            entries[f"{name}.mean_square"] = torch.stack([step.square / max(1, step.count) for step in steps]).float()
            entries[f"{name}.absmax"] = torch.stack([step.largest for step in steps])
            entries[f"{name}.range"] = torch.tensor([[step.low, step.high] for step in steps])
            entries[f"{name}.count"] = counts
        shared = {"arrowquant.shared": json.dumps(self._shared)}
        save_file({name: entry.cpu().contiguous() for name, entry in entries.items()}, path, shared)

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._timestep, self._last = self._timestep_of(args, kwargs), None

    @torch.no_grad()
    def _fed(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        if self._last is not None and self._last[1] is x and isinstance(layer, nn.Linear):
            if name not in self._statistics:  # such as k and v, which are fed what q is
                self._shared[name] = self._last[0]
                return
        elif name in self._shared:  # not this time: what was the same up to now is not any more
            self._statistics[name] = copy.deepcopy(self._statistics[self._shared.pop(name)])
        self._last = (name, x)
        for sample in x if isinstance(layer, CONVOLUTIONS) else [x]:  # unfolded, an image is as large as many
            self._add(name, inputs_of(layer, sample[None] if sample is not x else x), sample)

    def _add(self, name: str, inputs: Tensor, x: Tensor) -> None:
        """Count in some inputs, (n, in)."""
        inputs, cols = inputs.float(), inputs.shape[1]
        if name not in self._statistics:
            fits = cols <= self._most
            self._statistics[name] = Statistics(torch.zeros(cols, cols, device=x.device) if fits else None)
        statistics = self._statistics[name]
        if statistics.gram is not None:
            statistics.gram.addmm_(inputs.T, inputs)
        zero = torch.zeros(cols, device=x.device)
        step = statistics.steps.setdefault(self._timestep, Step(zero.double(), zero))
        step.square = step.square + (inputs.double() ** 2).sum(0)
        step.largest = torch.maximum(step.largest, inputs.abs().amax(0))
        step.low, step.high = min(step.low, float(x.min())), max(step.high, float(x.max()))
        step.count += len(inputs)


def inputs_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What each row of the layer's weight matrix is multiplied with, (n, in): of a convolution what its kernel sees."""
    if not isinstance(layer, CONVOLUTIONS):
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode)
    sizes = list(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True))
    for dimension, (size, stride, dilation) in enumerate(sizes, 2):
        x = x.unfold(dimension, dilation * (size - 1) + 1, stride)[..., ::dilation]
    places = len(sizes)  # x is (samples, channels, places…, kernel…); groups of channels are samples of their own
    x = x.unflatten(1, (layer.groups, -1)).movedim(2, 2 + places)
    return x.reshape(-1, layer.weight[0].numel())
