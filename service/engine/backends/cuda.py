"""CUDA kernels through CuPy: the same bytes as the reference, while pieces go up and come back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from service.engine.backends.base import Backend, Grid
from service.engine.backends.cpu import CpuBackend
from service.engine.backends.cpu_form import Form, column_weights, has_kernel
from service.engine.backends.cuda_many import QuantizeMany
from service.engine.backends.cuda_pieces import Compare, Dequantize, Observe, Quantize
from service.engine.backends.cupy_device import CupyDevice, device_count, why_not
from service.engine.backends.device import Device, DevicePool, Pieces
from service.engine.buffers import Buffers
from service.engine.histogram import Histogram
from service.engine.inputs import LayerInputs
from service.engine.methods.base import Method
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.metrics import ErrorSums
from service.engine.schemes.base import Scheme
from service.engine.schemes.codebook import CodebookScheme
from service.engine.schemes.integer import IntegerScheme
from service.engine.tensors import Array, FloatArray, QuantizedRows

#: Source bytes of a piece: enough to be worth a launch, few enough that several are under way.
PIECE_BYTES = 8 << 20
#: Elements. A row is one piece at least, and pieces are pinned; longer ones are left to the CPU.
LONGEST_ROW = 1 << 26
#: What there are kernels for; a subclass may mean something else.
SCHEMES = (IntegerScheme, CodebookScheme)


class CudaBackend(Backend):
    """Lends each call one of the devices. What has no kernel, or no device is left for, the CPU computes."""

    id: ClassVar[str] = "cuda"
    description: ClassVar[str] = "CUDA kernels on NVIDIA GPUs, with transfers while they compute"
    device: ClassVar[str] = "cuda"
    batch_bytes: ClassVar[int] = 2 * PIECE_BYTES

    def __init__(
        self, threads: int = 1, device_memory_bytes: int = 0, *, devices: Sequence[Device] | None = None
    ) -> None:
        """`devices` are by default all that there are."""
        super().__init__(threads, device_memory_bytes)
        if devices is None:
            devices = [CupyDevice(number, device_memory_bytes, threads) for number in range(device_count())]
        self._devices = DevicePool(devices)
        self._buffers = Buffers()
        self._host_lock = threading.Lock()
        self._made_host: CpuBackend | None = None

    @classmethod
    def unavailable(cls) -> str | None:
        """See `Backend.unavailable`."""
        return why_not()

    @classmethod
    def lanes(cls) -> int:
        """One for each device."""
        return max(1, device_count())

    def lost_devices(self) -> dict[str, str]:
        """See `Backend.lost_devices`."""
        return self._devices.lost

    def take_notices(self) -> list[str]:
        """See `Backend.take_notices`."""
        return self._devices.take_notices()

    def warm_up(self) -> None:
        """Compile every source, or load it from the disk cache."""
        x = np.linspace(-1.0, 1.0, 64, dtype=np.float32).reshape(2, 32)
        for method in (MinMax(), Mse()):
            self.compare(x, self.dequantize(self.quantize(x, IntegerScheme(group_size=16), method)))
            self.quantize_many([x], IntegerScheme(group_size=16), method)
        self.observe(x)

    def slice_bytes(self, method: Method) -> int:
        """See `Backend.slice_bytes`."""
        return 64 << 20 if isinstance(method, MinMax) else 32 << 20

    def quantize(
        self, x: Array, scheme: Scheme, method: Method, grid: Grid | None = None, inputs: LayerInputs | None = None
    ) -> QuantizedRows:
        """See `Backend.quantize`."""
        form = Form(scheme, *x.shape)
        is_weighted = grid is None and column_weights(method, inputs) is not None
        if not _fits(x) or not _has_kernel(form, method, grid) or is_weighted:
            return self._host.quantize(x, scheme, method, grid, inputs)
        pieces = Quantize(x, form, method, grid, self._buffers, self._on_host)
        self._run(pieces, x)
        return self.measure_output(x, pieces.result(), inputs)

    def quantize_many(self, xs: Sequence[Array], scheme: Scheme, method: Method) -> list[QuantizedRows]:
        """See `Backend.quantize_many`."""
        by_dtype: dict[np.dtype[Any], list[int]] = {}
        for index, x in enumerate(xs):
            if not _fits(x) or not _has_kernel(Form(scheme, *x.shape), method, None):
                return self._host.quantize_many(xs, scheme, method)
            by_dtype.setdefault(x.dtype, []).append(index)
        results: dict[int, QuantizedRows] = {}
        for indices in by_dtype.values():
            same = [xs[index] for index in indices]
            pieces = QuantizeMany(same, scheme, method, self._on_host)
            self._devices.run(pieces, PIECE_BYTES * len(same) // sum(x.nbytes for x in same))
            results |= dict(zip(indices, pieces.result(), strict=True))
        return [results[index] for index in range(len(xs))]

    def dequantize(self, q: QuantizedRows) -> FloatArray:
        """See `Backend.dequantize`."""
        if not q.rows * q.cols or q.cols > LONGEST_ROW or type(q.scheme) not in SCHEMES:
            return self._host.dequantize(q)
        pieces = Dequantize(q, self._buffers, self._on_host)
        self._run(pieces, pieces.out)
        return pieces.out

    def compare(self, x: Array, y: Array) -> ErrorSums:
        """See `Backend.compare`."""
        if not _fits(x):
            return self._host.compare(x, y)
        pieces = Compare(x, y, self._on_host)
        self._run(pieces, x)
        return pieces.sums()

    def observe(self, x: Array) -> Histogram:
        """See `Backend.observe`."""
        if not _fits(x):
            return self._host.observe(x)
        pieces = Observe(x, self._on_host)
        self._run(pieces, x)
        return pieces.histogram()

    def _run(self, pieces: Pieces, x: Array) -> None:
        self._devices.run(pieces, PIECE_BYTES // max(1, x.nbytes // x.shape[0]))

    def _on_host(self) -> CpuBackend:
        return self._host

    @property
    def _host(self) -> CpuBackend:
        with self._host_lock:
            if self._made_host is None:
                self._made_host = CpuBackend(self.threads)
            return self._made_host


def _has_kernel(form: Form, method: Method, grid: Grid | None) -> bool:
    return type(form.scheme) in SCHEMES and has_kernel(form, method, grid)


def _fits(x: Array) -> bool:
    return bool(x.size) and x.shape[1] <= LONGEST_ROW
