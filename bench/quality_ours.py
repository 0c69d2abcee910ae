"""What the service's engine makes of a layer: every method of the registry, with and without calibration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from bench.quality_layers import Layer
from bench.quality_peers import Restored
from service.engine.backends.base import Backend, Grid
from service.engine.backends.registry import backends
from service.engine.equalise import TRIAL_ROWS, Stretch
from service.engine.inputs import LayerInputs
from service.engine.low_rank import LowRank, find_down
from service.engine.methods.base import Method
from service.engine.methods.registry import methods
from service.engine.sampling import spread
from service.engine.schemes.base import Scheme
from service.engine.schemes.registry import build_scheme
from service.engine.tensors import Array, FloatArray, add_low_rank, low_rank_bytes

#: Widths of integers, with the sizes of their groups; None is a scale for a row.
SIZES: dict[int, tuple[int | None, ...]] = {
    2: (None, 128, 64, 32),
    3: (None, 128, 64, 32),
    4: (None, 256, 128, 64, 32),
    5: (128, 64),
    6: (128, 64),
    8: (None, 128, 64, 32),
}
NESTED_SIZES: dict[int, tuple[int, ...]] = {2: (16, 32), 3: (16, 32), 4: (16, 32), 5: (16, 32), 6: (16, 32)}
#: Schemes with which every method is tried; others go with those of FEW, which take less time or gain most.
THOROUGH = ("int2 g64", "int3 g64", "int4 g64", "int8 g64", "int2_nested g16", "int3_nested g16", "int4_nested g16")
FEW = ("mse", "gptq")


@dataclass(frozen=True, slots=True)
class Ours:
    """A scheme and a method."""

    scheme: Scheme
    method: Method
    is_calibrated: bool

    def restore(self, layer: Layer) -> Restored:
        """Quantize and read back; what AWQ divides inputs by is counted, and what a low-rank part takes."""
        x, inputs = layer.weights, layer.inputs if self.is_calibrated else None
        bits = 8.0 * self.scheme.stored_bytes(*x.shape)
        if self.method.low_rank:
            return self._beside_low_rank(x, inputs, bits)
        if self.method.scales_inputs and inputs is not None:
            trial = np.concatenate([x[slice(*span)] for span in spread(len(x), TRIAL_ROWS)])
            if (stretch := Stretch.of(trial, self.scheme, inputs, backend())) is not None:
                read = self._read(stretch.apply(x), stretch.inputs) / stretch.scale
                return Restored(read, bits + 8.0 * stretch.scale.nbytes)
        return Restored(self._read(x, inputs), bits)

    def _beside_low_rank(self, x: FloatArray, inputs: LayerInputs | None, bits: float) -> Restored:
        down = find_down(lambda: [x], *x.shape, self.method.low_rank, inputs)
        if down is None:
            return Restored(self._read(x, inputs), bits)
        low_rank, method = LowRank.of(down, inputs), self.method.quantizes_as
        codes = low_rank.quantize(x, self.scheme, method, self._grid(low_rank.apply(x), method), backend())
        read = backend().dequantize(codes)
        assert codes.up is not None, "it belongs to these codes"
        add_low_rank(read, codes.up, down)
        return Restored(read, bits + 8.0 * low_rank_bytes(*x.shape, len(down)))

    def _read(self, x: FloatArray, inputs: LayerInputs | None) -> FloatArray:
        method = self.method.quantizes_as
        return backend().dequantize(backend().quantize(x, self.scheme, method, self._grid(x, method), inputs))

    def _grid(self, x: Array, method: Method) -> Grid | None:
        return backend().tensor_grid(backend().observe(x), self.scheme, method) if self.scheme.takes_pass else None


def ours() -> Iterator[tuple[str, Ours]]:
    """Each scheme by its name, with every method, and again with calibration where that tells the method something."""
    for name, scheme in _schemes():
        for cls in methods().values():
            method = cls()
            if name not in THOROUGH and method.id not in FEW:
                continue
            if not method.needs:
                yield name, Ours(scheme, method, is_calibrated=False)
            if method.needs or method.is_weighted:
                yield name, Ours(scheme, method, is_calibrated=True)


def _schemes() -> Iterator[tuple[str, Scheme]]:
    for bits, sizes in SIZES.items():
        for size in sizes:
            granularity = "group" if size else "channel"
            scheme = build_scheme(f"int{bits}", symmetric=False, granularity=granularity, group_size=size)
            yield f"int{bits} {f'g{size}' if size else 'row'}", scheme
    yield "int8 g32, symmetric", build_scheme("int8", symmetric=True, group_size=32)
    for bits, some in NESTED_SIZES.items():
        for size in some:
            yield f"int{bits}_nested g{size}", build_scheme(f"int{bits}_nested", symmetric=False, group_size=size)
    for size in (32, 64):
        yield f"nf4 g{size}", build_scheme("nf4", symmetric=True, group_size=size)
    yield "mxfp4", build_scheme("mxfp4", symmetric=True, group_size=32)
    yield "nvfp4", build_scheme("nvfp4", symmetric=True, group_size=16)
    yield "mxfp8", build_scheme("mxfp8", symmetric=True, group_size=32)
    yield "fp8_e4m3 row", build_scheme("fp8_e4m3", symmetric=True, granularity="channel", group_size=None)


@cache
def backend() -> Backend:
    """Ours, on one core: layers are quantized beside each other."""
    return backends()["cpu"](threads=1)
