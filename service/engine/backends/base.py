"""What a backend is: the four operations the pipeline asks of a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from service.engine.backends.output_error import with_output
from service.engine.histogram import Histogram
from service.engine.inputs import LayerInputs
from service.engine.methods.base import Method
from service.engine.metrics import ErrorSums
from service.engine.schemes.base import Scheme
from service.engine.tensors import Array, FloatArray, QuantizedRows

#: The device that every machine has.
CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Grid:
    """What a whole tensor has one of, in float32: scale and zero point as stored, or the scale over those of groups."""

    scale: np.float32
    zero: np.float32


class Backend(ABC):
    """Quantizes row blocks. Thread-safe: several jobs share one instance."""

    #: The public name; also the module's.
    id: ClassVar[str]
    #: One line for `/v1/backends`.
    description: ClassVar[str]
    #: Where it computes; backends on the same device share its lanes.
    device: ClassVar[str] = CPU
    #: Source bytes of small tensors that are worth one call; 0 where it costs as much as a call for each.
    batch_bytes: ClassVar[int] = 0

    def __init__(self, threads: int = 1, device_memory_bytes: int = 0) -> None:
        """Of each device other than the CPU it may take so many bytes of memory; 0 is for as many as there are."""
        self.threads, self.device_memory_bytes = threads, device_memory_bytes

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot run here, or None."""
        return None

    @classmethod
    def lanes(cls) -> int:
        """How many jobs its device can serve at once, each as if it were alone."""
        return 1

    def lost_devices(self) -> dict[str, str]:
        """What of its device is out of service until the next start, each part with the reason."""
        return {}

    def take_notices(self) -> list[str]:
        """What went otherwise than planned in calls of this thread, since it was last asked; in sentences."""
        return []

    def warm_up(self) -> None:  # noqa: B027
        """Do now what the first call would have to do, such as compiling. Nothing by default."""

    @abstractmethod
    def slice_bytes(self, method: Method) -> int:
        """Source bytes that `quantize` gets through in some tens of milliseconds with this method.

        Fixed for a method, never measured: results must not depend on how fast a machine is today.
        """

    @abstractmethod
    def quantize(
        self, x: Array, scheme: Scheme, method: Method, grid: Grid | None = None, inputs: LayerInputs | None = None
    ) -> QuantizedRows:
        """Quantize x (rows, cols) of a float dtype, with its errors measured in the same pass.

        `grid` is given exactly when the scheme takes a pass. Rows of a tensor may come in pieces of a multiple of
        the scheme's `row_multiple`. When x holds a NaN or an infinity, `errors.finite` is False and the rest of the
        result is meaningless. `inputs` are those of the layer, with all fields that the method needs; with their
        Gram matrix the errors tell of the output as well.
        """

    def quantize_many(self, xs: Sequence[Array], scheme: Scheme, method: Method) -> list[QuantizedRows]:
        """Quantize small tensors, each with the result that `quantize` has for it; the scheme takes no pass."""
        return [self.quantize(x, scheme, method) for x in xs]

    @abstractmethod
    def dequantize(self, q: QuantizedRows) -> FloatArray:
        """What q stands for: float32 (rows, cols)."""

    @abstractmethod
    def compare(self, x: Array, y: Array) -> ErrorSums:
        """How far y (rows, cols) is from x, both of float dtypes."""

    @abstractmethod
    def observe(self, x: Array) -> Histogram:
        """What one pass over a tensor keeps of x (rows, cols), for `tensor_grid`."""

    def measure_output(self, x: Array, q: QuantizedRows, inputs: LayerInputs | None) -> QuantizedRows:
        """q, which x was quantized to, with what it does to the layer's output, where a Gram matrix is at hand."""
        if inputs is None or inputs.gram is None or not q.errors.finite or not x.size:
            return q
        return replace(q, errors=with_output(q.errors, x, self.dequantize(q), inputs.gram))

    def tensor_grid(self, seen: Histogram, scheme: Scheme, method: Method) -> Grid:
        """What `quantize` wants of a tensor, from what `observe` has seen of all its blocks."""
        if scheme.has_tensor_scale:
            return Grid(np.float32(scheme.tensor_scale_for(max(-seen.lo, seen.hi))), np.float32(0.0))
        values, weights = seen.points()
        scale, zero = method.find(np, values, scheme, weights)
        return Grid(np.float32(scale[0]), np.float32(zero[0]))
