"""The operations of the `cuda` backend on rows of one tensor, cut into pieces.

What a piece needs is laid out here, with NumPy alone, and any `Device` can run it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from service.engine.backends.base import Grid
from service.engine.backends.cpu import CpuBackend
from service.engine.backends.cpu_arrays import error_sums
from service.engine.backends.cpu_form import Form
from service.engine.backends.work import THREADS, Launch, Work
from service.engine.buffers import Buffers
from service.engine.histogram import BINS, Histogram
from service.engine.methods.base import Method
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.metrics import ErrorSums
from service.engine.packing import row_bytes
from service.engine.schemes.base import SCALE_DTYPES, Scheme
from service.engine.tensors import Array, FloatArray, QuantizedRows

#: What the kernels work on, in elements: see `kernels/common.cuh`.
TILE, BLOCK_TILES, HELD = 256, 64, 16
#: Sums of a block: x², y², xy, d², largest |d|.
SUMS = 5
#: How kernels call the dtypes that they read.
NAMES: dict[np.dtype[Any], str] = {
    np.dtype(np.float32): "f32",
    np.dtype(np.float16): "f16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
}

Host = Callable[[], CpuBackend]


class Rows(ABC):
    """Pieces of rows; each leaves something behind, which is put together in the order of the rows."""

    unit = "rows"

    def __init__(self, total: int, host: Host) -> None:
        self.total, self.host = total, host
        self.found: dict[int, Any] = {}

    @abstractmethod
    def work(self, first: int, last: int) -> Work:
        """See `Pieces.work`."""

    @abstractmethod
    def done(self, first: int, last: int, work: Work) -> None:
        """See `Pieces.done`."""

    @abstractmethod
    def on_host(self, first: int, last: int) -> None:
        """See `Pieces.on_host`."""

    def in_order(self) -> list[Any]:
        """What the pieces have left."""
        return [self.found[first] for first in sorted(self.found)]


class Quantize(Rows):
    """See `Backend.quantize`."""

    def __init__(self, x: Array, form: Form, method: Method, grid: Grid | None, buffers: Buffers, host: Host) -> None:
        super().__init__(form.rows, host)
        self.x, self.form, self.method, self.grid = x, form, method, grid
        scheme = form.scheme
        self.packed = buffers.empty((form.rows, row_bytes(form.cols, scheme.bits)), np.uint8)
        shape = (form.rows, form.row_groups) if grid is None else (1, 1)
        self.scale = np.empty(shape, SCALE_DTYPES[scheme.scale_dtype])
        self.zero = None if scheme.symmetric else np.empty(shape, np.uint8)
        if grid is not None:
            self.scale[:] = grid.scale
            if self.zero is not None:
                self.zero[:] = grid.zero

    def work(self, first: int, last: int) -> Work:
        """See `Pieces.work`."""
        x, form, grids = plain(self.x[first:last]), self.form, self._grids(first, last)
        shape = seen_shape(last - first, form)
        finds = self.grid is None and self.form.scheme.granularity == "group" and isinstance(self.method, MinMax)
        name = NAMES[x.dtype]
        sums = np.empty((tile_blocks(shape["rows"], shape["cols"]), SUMS))
        outputs: dict[str, Array] = {"packed": self.packed[first:last], "sums": sums}
        inputs: dict[str, Array] = {"x": x}
        (inputs if self.grid is not None else outputs).update(grids)
        launches = [Launch("quantize", f"quantize_{name}_{form.scheme.id}", len(sums))]
        if self.grid is None and not finds:
            launches.insert(0, self._grid_launch(name, last - first, inputs))
        return Work(
            tuple(launches),
            inputs,
            outputs,
            shape | scheme_numbers(form) | {
                "finds": finds,
                "is_aligned": shape["cols"] * x.itemsize % 16 == 0,
                "start_count": len(inputs.get("starts", ())),
            },
        )  # fmt: skip

    def done(self, first: int, last: int, work: Work) -> None:
        """See `Pieces.done`."""
        self.found[first] = error_sums((last - first) * self.form.cols, work.outputs["sums"])  # type: ignore[arg-type]

    def on_host(self, first: int, last: int) -> None:
        """See `Pieces.on_host`."""
        q = self.host().quantize(self.x[first:last], self.form.scheme, self.method, self.grid)
        self.packed[first:last] = q.packed
        if self.grid is None:
            self.scale[first:last] = q.scale
            if self.zero is not None and q.zero_point is not None:
                self.zero[first:last] = q.zero_point
        self.found[first] = q.errors

    def result(self) -> QuantizedRows:
        """All of it."""
        errors = sum(self.in_order(), ErrorSums())
        return QuantizedRows(self.form.scheme, self.form.cols, self.packed, self.scale, self.zero, errors)

    def _grids(self, first: int, last: int) -> dict[str, Array]:
        rows = slice(first, last) if self.grid is None else slice(None)
        return {"scale": self.scale[rows]} | ({} if self.zero is None else {"zero": self.zero[rows]})

    def _grid_launch(self, name: str, rows: int, inputs: dict[str, Array]) -> Launch:
        """What finds the grids before there are codes."""
        method, form = self.method, self.form
        if not isinstance(method, Mse):
            return Launch("quantize", f"find_rows_{name}", rows)
        inputs["starts"] = start_table(method, form.scheme)
        kind = "nf4" if form.codebook else "int"
        if form.scheme.granularity == "channel":
            return Launch("search", f"search_rows_{name}_{kind}", rows)
        lanes = rows * form.row_groups * (form.group // HELD)
        return Launch("search", f"search_groups_{name}_{kind}", -(-lanes // THREADS))


class Dequantize(Rows):
    """See `Backend.dequantize`."""

    def __init__(self, q: QuantizedRows, buffers: Buffers, host: Host) -> None:
        super().__init__(q.rows, host)
        self.q, self.form = q, Form(q.scheme, q.rows, q.cols)
        self.packed = np.ascontiguousarray(q.packed)
        self.out: FloatArray = buffers.empty((q.rows, q.cols), np.float32)

    def work(self, first: int, last: int) -> Work:
        """See `Pieces.work`."""
        q, form, packed = self._part(first, last), self.form, self.packed[first:last]
        shape = seen_shape(last - first, form)
        inputs: dict[str, Array] = {"packed": packed, "scale": np.ascontiguousarray(q.scale)}
        if q.zero_point is not None:
            inputs["zero"] = np.ascontiguousarray(q.zero_point)
        launch = Launch("dequantize", f"dequantize_{form.scheme.id}", tile_blocks(shape["rows"], shape["cols"]))
        numbers = scheme_numbers(form) | {"is_aligned": shape["cols"] % 4 == 0}
        return Work((launch,), inputs, {"out": self.out[first:last]}, shape | numbers)

    def done(self, first: int, last: int, work: Work) -> None:
        """See `Pieces.done`: the output is in its place."""

    def on_host(self, first: int, last: int) -> None:
        """See `Pieces.on_host`."""
        self.out[first:last] = self.host().dequantize(self._part(first, last))

    def _part(self, first: int, last: int) -> QuantizedRows:
        q, rows = self.q, slice(None) if self.q.scheme.granularity == "tensor" else slice(first, last)
        zero = None if q.zero_point is None else q.zero_point[rows]
        return QuantizedRows(q.scheme, q.cols, self.packed[first:last], q.scale[rows], zero, q.errors)


class Compare(Rows):
    """See `Backend.compare`."""

    def __init__(self, x: Array, y: Array, host: Host) -> None:
        super().__init__(x.shape[0], host)
        self.x, self.y = x, y

    def work(self, first: int, last: int) -> Work:
        """See `Pieces.work`."""
        x, y = plain(self.x[first:last]), plain(self.y[first:last])
        blocks = -(-x.size // (TILE * BLOCK_TILES))
        launch = Launch("measure", f"compare_{NAMES[x.dtype]}_{NAMES[y.dtype]}", blocks)
        return Work((launch,), {"x": x, "y": y}, {"sums": np.empty((blocks, SUMS))}, {"rows": 1, "cols": x.size})

    def done(self, first: int, last: int, work: Work) -> None:
        """See `Pieces.done`."""
        self.found[first] = error_sums((last - first) * self.x.shape[1], work.outputs["sums"])  # type: ignore[arg-type]

    def on_host(self, first: int, last: int) -> None:
        """See `Pieces.on_host`."""
        self.found[first] = self.host().compare(self.x[first:last], self.y[first:last])

    def sums(self) -> ErrorSums:
        """All of them."""
        return sum(self.in_order(), ErrorSums())


class Observe(Rows):
    """See `Backend.observe`."""

    def __init__(self, x: Array, host: Host) -> None:
        super().__init__(x.shape[0], host)
        self.x = x

    def work(self, first: int, last: int) -> Work:
        """See `Pieces.work`."""
        x = plain(self.x[first:last])
        outputs: dict[str, Array] = {
            "counts": np.empty(BINS, np.uint64),
            "remainders": np.empty(BINS, np.uint64),
            "extremes": np.empty(2, np.uint32),
        }
        launch = Launch("measure", f"observe_{NAMES[x.dtype]}", -(-x.size // (TILE * BLOCK_TILES)))
        return Work((launch,), {"x": x}, outputs, {"rows": 1, "cols": x.size}, clears=True)

    def done(self, first: int, last: int, work: Work) -> None:  # noqa: ARG002
        """See `Pieces.done`."""
        found = work.outputs
        self.found[first] = _histogram(found["counts"], found["remainders"], found["extremes"])

    def on_host(self, first: int, last: int) -> None:
        """See `Pieces.on_host`."""
        self.found[first] = self.host().observe(self.x[first:last])

    def histogram(self) -> Histogram:
        """All of it."""
        parts: list[Histogram] = self.in_order()
        return sum(parts[1:], parts[0])


def plain(x: Array) -> Array:
    """Contiguous, of a dtype that the kernels read."""
    if x.dtype in NAMES:
        return np.ascontiguousarray(x)
    # A float64 too large for float32 becomes an infinity, which the finite check then reports.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, dtype=np.float32)


def seen_shape(rows: int, form: Form) -> dict[str, int]:
    """How the kernels are to see so many rows: as one where they may, of whole groups and whole words of codes."""
    nbytes = row_bytes(form.cols, form.scheme.bits)
    has_whole_groups = not form.row_groups or (form.scheme.granularity == "group" and form.cols % form.group == 0)
    merged = rows if has_whole_groups and nbytes * 8 == form.cols * form.scheme.bits else 1
    return {
        "rows": rows // merged,
        "cols": form.cols * merged,
        "row_bytes": nbytes * merged,
        "row_grids": form.row_groups * merged,
        "group": form.group,
    }


def scheme_numbers(form: Form) -> dict[str, float]:
    """The numbers by which the kernels know a scheme."""
    divisor, top, implied, symmetric, kind, _ = form.numbers()
    floats = {"divisor": float(divisor), "top": float(top), "implied": float(implied)}
    return {**floats, "symmetric": symmetric, "scale_kind": kind}


def tile_blocks(rows: int, cols: int) -> int:
    """Blocks for kernels that give a warp a tile of a row at a time."""
    return -(-rows * -(-cols // TILE) // BLOCK_TILES)


def start_table(method: Mse, scheme: Scheme) -> FloatArray:
    """(starts, 3): clips of both ends and how many steps may follow; first the range as it is, if only to be kept."""
    starts = [(low, high, method.max_iterations) for low, high in method.starts(scheme)]
    if not starts or starts[0][:2] != (1.0, 1.0):
        starts.insert(0, (1.0, 1.0, 0))
    return np.array(starts, np.float32)


def _histogram(counts: Array, remainders: Array, extremes: Array) -> Histogram:
    """From the counts of a bin and the sums of its patterns' lower halves."""
    bins = np.arange(BINS, dtype=np.uint32) << np.uint32(16)
    base = bins.view(np.float32)
    finite = not bool(counts[~np.isfinite(base)].any())
    sums = np.zeros(BINS)
    if finite:
        used = np.isfinite(base)
        low = base[used].astype(np.float64)
        step = (bins[used] | np.uint32(1)).view(np.float32).astype(np.float64) - low
        sums[used] = counts[used].astype(np.float64) * low + remainders[used].astype(np.float64) * step
    least, largest = _number(~extremes[0]), _number(extremes[1])
    return Histogram(counts.astype(np.int64), sums, least, largest, finite)


def _number(pattern: Any) -> float:
    """What `in_order` of the kernels was made from."""
    bits = int(pattern)
    bits = bits & 0x7FFFFFFF if bits >> 31 else ~bits & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))
