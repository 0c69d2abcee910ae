"""What a run will hold in memory at most, from headers and configuration: the model that admission goes by.

It is meant to be a little high: a test holds it against the measured peaks of real runs. What follows the block is
the block that is worked on, the one that is read ahead, what comes of it, and what waits to be written; formats add
what they hold themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.engine.backends.reference import TILE_ELEMENTS
from service.engine.blocks import row_blocks
from service.engine.calibration.feed import Feed
from service.engine.equalise import TRIAL_ROWS
from service.engine.formats.base import Format, ModelReader
from service.engine.formats.registry import find_format
from service.engine.histogram import BINS
from service.engine.low_rank import SPARE
from service.engine.plan import OutputPlan, Plan, TensorPlan
from service.engine.schemes.base import ROW_MULTIPLE, Scheme
from service.engine.tensors import FLOAT_DTYPES, TensorInfo
from service.engine.write_behind import WAITING_BYTES
from service.errors import ExceedsMemory

#: What allocators keep, and all that is small.
OVERHEAD_BYTES = 32 << 20
#: Of a block that small, allocators keep one that is no longer used.
KEPT_BLOCK_BYTES = 32 << 20
#: Temporaries for an element of a tile that NumPy works on.
TILE_ELEMENT_BYTES = 64
#: Per scale while it is computed: itself and the zero point in float32, and both as they are stored.
SCALE_BYTES = 11
#: Elements that one histogram covers, of a tensor with one grid, and the bytes of a histogram.
OBSERVED_ELEMENTS, HISTOGRAM_BYTES = 1 << 22, 16 * BINS
#: What is kept of a tensor for its whole run: header, decisions, and in each output its report and place.
TENSOR_BYTES, OUTPUT_TENSOR_BYTES = 3 << 10, 4 << 10
#: For each element of a factor of a low-rank part: itself, what it is multiplied with, and sums in float64.
FACTOR_BYTES = 32
#: The widest codes that a fallback may take.
FALLBACK_BITS = 8


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes above the idle service, and the tensor that asks for most of them."""

    nbytes: int
    tensor: str | None
    block_bytes: int


def need_to_quantize(plan: Plan, block_bytes: int) -> Need:
    """What a run of this plan will hold."""
    source = find_format(plan.source_format)
    peaks = {tensor.info.name: _quantizing(tensor, plan, source, block_bytes) for tensor in plan.tensors}
    records = len(plan.tensors) * (TENSOR_BYTES + len(plan.outputs) * OUTPUT_TENSOR_BYTES)
    return _need(_largest(peaks), records + min(WAITING_BYTES, plan.source_bytes), block_bytes)


def need_to_validate(original: ModelReader, quantized: ModelReader, block_bytes: int, feed: Feed | None = None) -> Need:
    """What comparing two models will hold; whether they fit together is not asked."""
    others = {info.name: info for info in quantized.tensors}
    before, after = find_format(original.format_id), find_format(quantized.format_id)
    peaks = {
        info.name: before.reading_bytes(info, _block_bytes(info, block_bytes))
        + after.reading_bytes(others[info.name], _block_bytes(others[info.name], block_bytes, like=info))
        + (feed.held_bytes(info) if feed is not None and others[info.name].stored_as else 0)
        for info in original.tensors
        if info.name in others
    }
    records = len(original.tensors) * (2 * TENSOR_BYTES + OUTPUT_TENSOR_BYTES)
    return _need(_largest(peaks), records, block_bytes)


def check_need(need: Need, limit_bytes: int) -> None:
    """Raise ExceedsMemory when a run can never have what it needs."""
    if need.nbytes > limit_bytes:
        about = f", most of it for tensor {need.tensor}" if need.tensor is not None else ""
        raise ExceedsMemory(
            f"the job needs {need.nbytes} bytes of memory{about} with block_bytes {need.block_bytes}, and all jobs"
            f" together may have {limit_bytes}",
            tensor=need.tensor,
        )


def _need(working: tuple[int, str | None], records: int, block_bytes: int) -> Need:
    kept = min(block_bytes, KEPT_BLOCK_BYTES, working[0])
    return Need(working[0] + records + kept + OVERHEAD_BYTES, working[1], block_bytes)


def _largest(peaks: Mapping[str, int]) -> tuple[int, str | None]:
    name = max(peaks, key=peaks.__getitem__, default=None)
    return (0, None) if name is None else (peaks[name], name)


def _quantizing(tensor: TensorPlan, plan: Plan, source: type[Format], block_bytes: int) -> int:
    info, multiple = tensor.info, tensor.row_multiple
    rows, block = _rows(info, block_bytes, multiple), _block_bytes(info, block_bytes, multiple=multiple)
    reading = block + source.reading_bytes(info, block)
    ways = list(zip(plan.outputs, tensor.decisions, strict=True))
    # One way after the other, while what came of the one before is written.
    coding = max((_coding(o, info, d.scheme, rows) for o, d in ways if d.scheme is not None), default=0)
    feeding = plan.feed.held_bytes(info) if plan.feed is not None and tensor.is_fed else 0
    writing = max(block if d.scheme is None else _codes(o, info, d.scheme, rows) for o, d in ways)
    is_stretched = any(d.method is not None and d.method.scales_inputs for _, d in ways)
    solving = sum(d.method.held_bytes(info.cols) for _, d in ways if d.method is not None)
    rank = max((d.method.low_rank for _, d in ways if d.method is not None), default=0)
    beside = max(_stretching(tensor, rows) if is_stretched else 0, _factoring(tensor, rows, rank) if rank else 0)
    return reading + coding + writing + feeding + solving + beside


def _stretching(tensor: TensorPlan, rows: int) -> int:
    """A block in float32 as it is scaled, quantized and read back, and the Gram matrix of divided inputs."""
    cols = tensor.info.cols
    gram = cols * cols if tensor.tells and "gram" in tensor.tells else 0
    return 4 * (3 * rows * cols + 2 * gram)


def _factoring(tensor: TensorPlan, rows: int, rank: int) -> int:
    """A block in float32 as it was, as it is quantized, read back and multiplied, and both factors in the making."""
    cols = tensor.info.cols
    return 16 * max(rows, TRIAL_ROWS) * cols + (rank + SPARE) * (16 * rows + FACTOR_BYTES * cols)


def _codes(output: OutputPlan, info: TensorInfo, scheme: Scheme, rows: int) -> int:
    """Codes and scales of a block."""
    bits = max(scheme.bits, FALLBACK_BITS) if output.config.on_failure == "fallback" else scheme.bits
    scales = scheme.scale_rows(rows) * scheme.groups(info.cols)
    return rows * info.cols * bits // 8 + scales * SCALE_BYTES


def _coding(output: OutputPlan, info: TensorInfo, scheme: Scheme, rows: int) -> int:
    bits = max(scheme.bits, FALLBACK_BITS) if output.config.on_failure == "fallback" else scheme.bits
    elements = rows * info.cols
    histograms = (elements // OBSERVED_ELEMENTS + 2) * HISTOGRAM_BYTES if scheme.takes_pass else 0
    tiles = min(elements, max(TILE_ELEMENTS, info.cols)) * TILE_ELEMENT_BYTES
    return _codes(output, info, scheme, rows) + histograms + tiles + output.format.writing_bytes(rows, info.cols, bits)


def _rows(info: TensorInfo, block_bytes: int, multiple: int = ROW_MULTIPLE) -> int:
    start, stop = next(row_blocks(info, block_bytes, multiple), (0, 0))
    return stop - start


def _block_bytes(
    info: TensorInfo, block_bytes: int, like: TensorInfo | None = None, multiple: int = ROW_MULTIPLE
) -> int:
    """Bytes of a tensor that are read at once: in rows, as many as of the one that it is `like`."""
    if not info.is_float:
        return min(info.nbytes, block_bytes)
    return _rows(like or info, block_bytes, multiple) * info.cols * FLOAT_DTYPES[info.dtype].itemsize
