"""Numba kernels on all cores: the same bytes as the reference, at a share of memory's speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from service.engine.backends.base import Grid
from service.engine.backends.cpu_arrays import CONVERTED_ELEMENTS, SUMS, Input, Result, error_sums
from service.engine.backends.cpu_form import TILE_ELEMENTS, Form, column_weights, has_kernel, is_measured_alike
from service.engine.backends.cpu_gptq import GptqRun
from service.engine.backends.reference import ReferenceBackend, bound
from service.engine.buffers import Buffers
from service.engine.decode import regions, scales_of_rows
from service.engine.histogram import BINS, Histogram
from service.engine.inputs import LayerInputs
from service.engine.methods.base import Method, Solution
from service.engine.methods.gptq import Gptq
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.metrics import ErrorSums
from service.engine.packing import row_bytes
from service.engine.schemes.base import BLOCK, Scheme
from service.engine.schemes.codebook import CodebookScheme
from service.engine.schemes.float8 import Float8E4M3
from service.engine.schemes.integer import IntegerScheme
from service.engine.schemes.microscaling import Mx
from service.engine.schemes.nested import NestedScheme
from service.engine.tensors import Array, FloatArray, QuantizedRows

#: Below this many elements a second thread costs more than it brings.
INLINE_ELEMENTS = 1 << 17
#: Pieces that each thread gets of a large input, so that none waits long for the last.
PIECES_PER_THREAD = 4
#: Elements of a histogram that is added up on its own.
OBSERVED_ELEMENTS = 1 << 22
#: Results from this size on are not kept in the cache, which they would only empty.
STREAMED_BYTES = 8 << 20
#: Columns that take every step of a walk through a Gram matrix.
WARMED_COLUMNS = 288

Fill = Callable[[int, int], None]


class CpuBackend(ReferenceBackend):
    """Splits rows over threads of its own; what has no kernel runs as the reference does."""

    id: ClassVar[str] = "cpu"
    description: ClassVar[str] = "Numba on all cores, with the codes packed and the errors measured in one pass"
    batch_bytes: ClassVar[int] = 4 << 20

    def __init__(self, threads: int = 1, device_memory_bytes: int = 0) -> None:
        super().__init__(threads, device_memory_bytes)
        # Imported here, not with the module: a listing of the backends need not pay for Numba.
        from service.engine.backends.cpu_kernels import histogram, nested, rows, search, weighted_search

        self._rows, self._search, self._observe, self._nested = rows, search, histogram, nested
        self._weighted_search = weighted_search
        self._buffers = Buffers()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="arrowquant-cpu") if threads > 1 else None

    def warm_up(self) -> None:
        """Compile every kernel, or load it from the disk cache."""
        x = np.linspace(-1.0, 1.0, 64, dtype=np.float32).reshape(2, 32)
        for method in (MinMax(), Mse()):
            self.compare(x, self.dequantize(self.quantize(x, IntegerScheme(group_size=16), method)))
            self.quantize(x, NestedScheme(), method)
        fed = LayerInputs(WARMED_COLUMNS, gram=np.eye(WARMED_COLUMNS, dtype=np.float32))
        long = np.linspace(-1.0, 1.0, 2 * WARMED_COLUMNS, dtype=np.float32).reshape(2, -1)
        for calibrated in (Mse(), Gptq()):
            self.quantize(long, IntegerScheme(group_size=16), calibrated, inputs=fed)
        for small in (Mx(), Float8E4M3(granularity="block")):
            self.dequantize(self.quantize(x, small, MinMax()))
        self.observe(x)

    def slice_bytes(self, method: Method) -> int:
        """See `Backend.slice_bytes`."""
        return 8 << 20 if isinstance(method, (MinMax, Gptq)) else 4 << 20

    def quantize(
        self, x: Array, scheme: Scheme, method: Method, grid: Grid | None = None, inputs: LayerInputs | None = None
    ) -> QuantizedRows:
        """See `Backend.quantize`."""
        form = Form(bound(scheme, grid), *x.shape)
        if x.size and type(scheme) is NestedScheme and is_measured_alike(method, inputs):
            return self.measure_output(x, self._nested_rows(x, form, scheme, method), inputs)
        weights = column_weights(method, inputs)
        in_blocks = scheme.granularity == "block"
        if not x.size or not has_kernel(form, method, grid) or (in_blocks and weights is not None):
            return super().quantize(x, scheme, method, grid, inputs)
        if in_blocks:
            found = self._in_blocks(x, form, method)
        else:
            one_grid = grid if scheme.granularity == "tensor" else None
            found = replace(self._computed(x, form, method, one_grid, weights).packed_rows(), scheme=scheme)
        return self.measure_output(x, found, inputs)

    def _solved(self, x: FloatArray, scheme: Scheme, method: Method, inputs: LayerInputs) -> Solution:
        form = Form(scheme, *x.shape)
        known = type(scheme) in (IntegerScheme, CodebookScheme) and has_kernel(form, MinMax(), None)
        if not x.size or type(method) is not Gptq or not known:
            return super()._solved(x, scheme, method, inputs)

        def split(fill: Fill, rows: int, step: int) -> None:
            self._split(fill, rows, step, form.cols * INLINE_ELEMENTS)

        return GptqRun(form, method, inputs, split).solve(x)

    def _nested_rows(self, x: Array, form: Form, scheme: NestedScheme, method: Method) -> QuantizedRows:
        source, packed = Input(x), self._buffers.empty((form.rows, row_bytes(form.cols, scheme.bits)), np.uint8)
        made = self._nested.NestedRows.of(scheme, form.rows, form.cols, form.tile_rows, packed)

        def fill(first: int, last: int) -> None:
            address = source.address(first * form.cols, last * form.cols)
            if isinstance(method, Mse):
                made.search(address, source.kind, method, first, last)
            else:
                made.find_ranges(address, source.kind, first, last)
            made.encode(address, source.kind, first, last)

        self._split(fill, form.rows, form.tile_rows, form.cols, source)
        grids = form.rows, form.row_groups
        with np.errstate(over="ignore", invalid="ignore"):  # of what is not finite, which its sums show
            scale, zero = scheme.stored_grid(made.scale.reshape(grids), made.zero.reshape(grids), form.cols)
        return QuantizedRows(scheme, form.cols, packed, scale, zero, error_sums(x.size, made.sums))

    def quantize_many(self, xs: Sequence[Array], scheme: Scheme, method: Method) -> list[QuantizedRows]:
        """See `Backend.quantize_many`."""
        alike: dict[tuple[tuple[int, ...], np.dtype[Any]], list[int]] = {}
        for index, x in enumerate(xs):
            alike.setdefault((x.shape, x.dtype), []).append(index)
        found: dict[int, QuantizedRows] = {}
        for indices in alike.values():
            found |= zip(indices, self._quantize_alike([xs[i] for i in indices], scheme, method), strict=True)
        return [found[index] for index in range(len(xs))]

    def _quantize_alike(self, xs: Sequence[Array], scheme: Scheme, method: Method) -> list[QuantizedRows]:
        """Tensors of one shape and dtype: under each other, where the errors of each are those of one tile."""
        rows, cols = xs[0].shape
        alone = Form(scheme, rows, cols)
        alike = rows <= alone.tile_rows and scheme.granularity != "block"
        if not rows * cols or not alike or not has_kernel(alone, method, None):
            return [self.quantize(x, scheme, method) for x in xs]
        form = Form(scheme, rows * len(xs), cols, rows)
        return self._computed(self._under_each_other(xs), form, method, None).packed_tensors()

    def _under_each_other(self, xs: Sequence[Array]) -> Array:
        """Tensors of one shape and dtype as one, not copied where they lie so already."""
        first, (rows, cols) = xs[0], xs[0].shape
        places = [x.__array_interface__["data"][0] if x.flags.c_contiguous else 0 for x in xs]
        if places == list(range(places[0], places[0] + len(xs) * first.nbytes, first.nbytes)) and places[0]:
            return np.lib.stride_tricks.as_strided(first, (rows * len(xs), cols), writeable=False)
        together = self._buffers.empty((rows * len(xs), cols), first.dtype)
        # As bytes: NumPy copies dtypes that it does not know one by one.
        np.concatenate([np.ascontiguousarray(x).view(np.uint8) for x in xs], out=together.view(np.uint8))
        return together

    def _computed(
        self, x: Array, form: Form, method: Method, grid: Grid | None, weights: FloatArray | None = None
    ) -> Result:
        source, result = Input(x), Result(form, grid, self._buffers)

        def fill(first: int, last: int) -> None:
            address = source.address(first * form.cols, last * form.cols)
            if grid is None and isinstance(method, Mse):
                self._search_grids(address, source.kind, form, method, weights, first, last, result)
            self._quantize_rows(
                address, source.kind, form, isinstance(method, MinMax) and grid is None, first, last, result
            )

        self._split(fill, form.rows, form.tile_rows, form.cols, source)
        return result

    def _in_blocks(self, x: Array, form: Form, method: Method) -> QuantizedRows:
        """What has a scale for a block: as groups of a row whose scales are given."""
        source, result = Input(x), Result(form, None, self._buffers)
        scale = self._block_scales(x, form, method)
        result.scale[:] = np.repeat(scale, BLOCK, axis=0)[: form.rows].reshape(-1)

        def fill(first: int, last: int) -> None:
            address = source.address(first * form.cols, last * form.cols)
            self._quantize_rows(address, source.kind, form, False, first, last, result)

        self._split(fill, form.rows, form.tile_rows, form.cols, source)
        return replace(result.packed_rows(), scale=form.scheme.stored_grid(scale, scale, form.cols)[0])

    def _block_scales(self, x: Array, form: Form, method: Method) -> FloatArray:
        """(rows of blocks, blocks of a row), as they read back after being stored."""
        scheme = form.scheme
        scale = np.empty((scheme.scale_rows(form.rows), form.row_groups), np.float32)
        if isinstance(method, MinMax):
            ends = [np.maximum.reduceat(end, range(0, form.rows, BLOCK)) for end in self._ranges(x, form)]
            with np.errstate(over="ignore", invalid="ignore"):  # of what is not finite, which shows later
                scale[:], _ = scheme.grid(np, -ends[0], ends[1])
            return scale
        alone = type(scheme).model_validate(scheme.model_dump() | {"granularity": "channel"})
        for region in regions(scheme, form.rows, form.cols):
            blocks = region.groups_of(np, x)  # each a row of its own
            searched = self._computed(blocks.reshape(-1, blocks.shape[-1]), Form(alone, *_flat(blocks)), method, None)
            scale[region.scale_rows, region.scale_columns] = searched.scale.reshape(blocks.shape[:2])
        return scale

    def _ranges(self, x: Array, form: Form) -> list[FloatArray]:
        """How far each group of a row goes below and above zero, (rows, groups)."""
        source, rows = Input(x), self._rows
        lows, highs = (np.empty(form.grids, np.float32) for _ in range(2))

        def fill(first: int, last: int) -> None:
            rows.range_rows(
                source.address(first * form.cols, last * form.cols), source.kind, form.cols, first, last,
                form.group, form.row_groups, lows, highs, np.empty(rows.SPAN_BUFFER, np.float32),
            )  # fmt: skip

        self._split(fill, form.rows, form.tile_rows, form.cols, source)
        return [end.reshape(form.rows, form.row_groups) for end in (-lows, highs)]

    def dequantize(self, q: QuantizedRows) -> FloatArray:
        """See `Backend.dequantize`."""
        form = Form(q.scheme, q.rows, q.cols)
        if not q.rows * q.cols or (form.table is None and type(q.scheme) is not NestedScheme):
            return super().dequantize(q)
        out = self._buffers.empty((q.rows, q.cols), np.float32)
        packed = np.ascontiguousarray(q.packed)
        # Copies: a read-only array would be another signature.
        scales = scales_of_rows(q.scheme, q.scale, 0, q.rows, q.tensor_scale)
        scale, zero = (part.reshape(-1) for part in q.scheme.float_grid(scales, q.zero_point, q.cols))
        table = form.table or 0

        def fill(first: int, last: int) -> None:
            rows = self._rows
            rows.dequantize_rows(
                packed.ctypes.data, packed.shape[1], q.cols, first, last, form.group, form.row_groups,
                q.scheme.bits, table, scale, zero, out, out.nbytes >= STREAMED_BYTES,
                np.empty(rows.SPAN_BUFFER, np.float32), np.empty(rows.CODE_BUFFER, np.uint8),
            )  # fmt: skip

        self._split(fill, form.rows, form.tile_rows, form.cols)
        return out

    def compare(self, x: Array, y: Array) -> ErrorSums:
        """See `Backend.compare`."""
        if not x.size:
            return super().compare(x, y)
        a, b = Input(x), Input(y)
        sums = np.empty((-(-x.size // TILE_ELEMENTS), SUMS))

        def fill(first: int, last: int) -> None:
            rows = self._rows
            rows.compare_elements(
                a.address(first, last), a.kind, b.address(first, last), b.kind, first, last, TILE_ELEMENTS, sums,
                np.empty(rows.SPAN_BUFFER, np.float32), np.empty(rows.SPAN_BUFFER, np.float32),
                np.empty(rows.SUM_BUFFER),
            )  # fmt: skip

        self._split(fill, x.size, TILE_ELEMENTS, 1, a, b)
        return error_sums(x.size, sums)

    def observe(self, x: Array) -> Histogram:
        """See `Backend.observe`."""
        if not x.size:
            return super().observe(x)
        source = Input(x)
        # Pieces of one size, added up in order: the sums do not depend on the threads.
        parts: list[Histogram | None] = [None] * -(-x.size // OBSERVED_ELEMENTS)

        def fill(first: int, last: int) -> None:
            for start in range(first, last, OBSERVED_ELEMENTS):
                end = min(start + OBSERVED_ELEMENTS, last)
                parts[start // OBSERVED_ELEMENTS] = self._histogram(source, start, end)

        self._split(fill, x.size, OBSERVED_ELEMENTS, 1, source)
        found = [part for part in parts if part is not None]
        return sum(found[1:], found[0])

    def _histogram(self, source: Input, first: int, last: int) -> Histogram:
        counts, sums = np.zeros(BINS, np.int64), np.zeros(BINS)
        extremes = np.array([np.inf, -np.inf], np.float32)
        self._observe.observe_elements(
            source.address(first, last), source.kind, first, last, counts, sums, extremes,
            np.empty(self._rows.SPAN_BUFFER, np.float32),
        )  # fmt: skip
        finite = bool(np.isfinite(sums).all())
        return Histogram(counts, sums if finite else np.zeros(BINS), float(extremes[0]), float(extremes[1]), finite)

    def _split(self, fill: Fill, total: int, step: int, weight: int, *inputs: Input) -> None:
        """Call `fill` on pieces of range(total), each a multiple of `step`; an item has `weight` elements."""
        pieces = self.threads * PIECES_PER_THREAD if self._pool and total * weight > INLINE_ELEMENTS else 1
        size = -(-total // pieces)
        if any(i.converts for i in inputs):
            size = min(size, CONVERTED_ELEMENTS // weight)
        size = max(1, -(-size // step)) * step
        spans = iter([(first, min(first + size, total)) for first in range(0, total, size)])

        def work() -> None:
            for first, last in spans:  # each thread the next that none has taken
                fill(first, last)

        if self._pool is None or size >= total:
            work()
        else:
            for done in [self._pool.submit(work) for _ in range(self.threads)]:
                done.result()

    def _search_grids(
        self, address: int, kind: int, form: Form, method: Mse, weights: FloatArray | None,
        first: int, last: int, result: Result,
    ) -> None:  # fmt: skip
        search, rows = self._search, self._rows
        clips = search.lots_of_starts(method.starts(form.scheme))
        whole = form.cols // form.group
        for first_group, last_group, size in ((0, whole, form.group), (whole, form.row_groups, form.cols % form.group)):
            if last_group > first_group and weights is not None:
                self._weighted_search.search_weighted_grids(
                    address, kind, form.cols, first, last, form.row_groups, form.group, first_group, last_group, size,
                    weights, clips, method.max_iterations, form.table, form.numbers(), result.scale, result.zero,
                    np.empty(2 * search.LANES * size, np.float32),
                    np.empty(rows.SPAN_BUFFER, np.float32),
                    np.empty(search.LANE_STATE, np.float32),
                )  # fmt: skip
            elif last_group > first_group:
                turns = search.TURNS if size <= search.LONGEST_IN_TURNS else 1
                search.search_grids(
                    address, kind, form.cols, first, last, form.row_groups, form.group, first_group, last_group, size,
                    clips, method.max_iterations, form.table, form.numbers(), result.scale, result.zero,
                    np.empty(turns * search.LANES * rows.whole_vectors(size), np.float32),
                    np.empty(rows.SPAN_BUFFER, np.float32),
                    np.empty(turns * search.LANE_STATE, np.float32),
                )  # fmt: skip

    def _quantize_rows(
        self, address: int, kind: int, form: Form, find: bool, first: int, last: int, result: Result
    ) -> None:
        rows = self._rows
        rows.quantize_rows(
            address, kind, form.cols, first, last, form.tile_rows, form.group, form.row_groups,
            form.scheme.bits, form.table, form.numbers(), find,
            result.scale, result.zero, result.scale_bits, result.zero_codes,
            result.packed, result.packed.shape[1], result.sums,
            np.empty(rows.SPAN_BUFFER, np.float32), np.empty(rows.RANGE_BUFFER, np.float32),
            np.empty(rows.CODE_BUFFER, np.uint8), np.empty(rows.SUM_BUFFER),
        )  # fmt: skip
        if result.small_scales.size:
            *_, kind_of_scale, under = form.numbers()
            spans = first * form.row_groups, last * form.row_groups
            rows.store_small_scales(result.scale, *spans, kind_of_scale, under, result.small_scales)


def _flat(blocks: FloatArray) -> tuple[int, int]:
    return blocks.shape[0] * blocks.shape[1], blocks.shape[2]
