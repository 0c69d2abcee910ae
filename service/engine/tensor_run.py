"""One tensor through all outputs: read once, quantize each way that is asked for, check, fall back.

Writers are called in another thread, which writes what is quantized while the next rows are; so nothing is asked of
them here, and each call is put behind the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from service.engine.activation_groups import Wanted, find_grids
from service.engine.attempt import Attempt, grouped
from service.engine.backends.base import Backend
from service.engine.blocks import row_blocks, row_spans
from service.engine.calibration.feed import Feed
from service.engine.clock import Clock
from service.engine.completion import Completion
from service.engine.config import ResolvedConfig
from service.engine.equalise import TRIAL_ROWS, Stretch
from service.engine.formats.base import ModelReader, ModelWriter
from service.engine.histogram import Histogram
from service.engine.inputs import LayerInputs
from service.engine.low_rank import LowRank, find_down
from service.engine.meter import Meter
from service.engine.methods.base import Method
from service.engine.metrics import ErrorSums, Quality
from service.engine.plan import Decision, OutputPlan, TensorPlan
from service.engine.progress import Cancelled, Notice, Report
from service.engine.publish import stop_when
from service.engine.report import TensorReport
from service.engine.sampling import spread
from service.engine.schemes.base import Scheme
from service.engine.tensors import Array, QuantizedRows, TensorInfo, non_finite
from service.engine.verdict import Warn, judge
from service.engine.write_behind import WriteBehind
from service.errors import NonFiniteWeights

Way = tuple[Scheme, Method]


@dataclass(frozen=True, slots=True)
class Stations:
    """What every tensor of a run goes through. Writers and `completion` belong to the thread of `behind`."""

    outputs: Sequence[OutputPlan]
    reader: ModelReader
    writers: Sequence[ModelWriter]
    behind: WriteBehind
    completion: Completion
    meter: Meter
    warn: Warn
    feed: Feed | None = None


@dataclass(frozen=True, slots=True)
class Tools:
    """What every step of a run uses."""

    backend: Backend
    block_bytes: int
    report: Report
    cancelled: Cancelled
    clock: Clock


class TensorRun:
    """Runs one tensor; `execute` once."""

    def __init__(
        self, plan: TensorPlan, stations: Stations, tools: Tools, ready: Mapping[Way, QuantizedRows] | None = None
    ) -> None:
        """`ready` is what comes of all its rows in each of the ways that are planned, when that is known already."""
        self.plans = (plan,)
        self._info = plan.info
        self._decisions = plan.decisions
        self._is_fed = plan.is_fed
        self._inputs: LayerInputs | None = None
        self._low_ranks: dict[int, LowRank | None] = {}  # by rank, as far as they were looked for
        self._stations, self._tools = stations, tools
        self._ready = ready or {}
        self._outputs, self._behind = stations.outputs, stations.behind
        self._started = time.monotonic()
        self._reports: dict[int, TensorReport] = {}  # filled by the thread that writes

    def execute(self) -> None:
        """Have the tensor stored in every output.

        Raises NonFiniteWeights or AccuracyTooLow where the configuration says `fail`.
        """
        warn_of_notable(self._info, self._decisions, self._stations)
        self._inputs = self._read_inputs()
        attempts = grouped(dict(enumerate(self._decisions)))
        while attempts:
            self._stretch(attempts)
            self._factor(attempts)
            self._find_grids(attempts)
            self._group_timesteps(attempts)
            for attempt in attempts:
                for output in attempt.outputs:
                    writer, beside = self._stations.writers[output], attempt.beside(output)
                    self._behind.put(partial(writer.begin, self._info, attempt.decision.scheme, beside))
            self._write(attempts)
            for text in self._tools.backend.take_notices():
                self._stations.warn(Notice("device_lacking", text, self._info.name))
            attempts = grouped(self._settle(attempts))
        self._behind.put(self._finish)

    def _read_inputs(self) -> LayerInputs | None:
        feed = self._stations.feed
        if feed is None or not self._is_fed:
            return None
        stop_when(self._tools.cancelled)
        with self._tools.clock.during("read"):
            return feed.inputs(self._info)

    def _finish(self) -> None:
        self._stations.completion.finished(tuple(self._reports[index] for index in range(len(self._outputs))))

    def _stretch(self, attempts: list[Attempt]) -> None:
        """Find what the layer's inputs are divided by, where a method wants that."""
        if self._inputs is None:
            return
        for attempt in attempts:
            scheme, method = attempt.decision.scheme, attempt.decision.method
            if scheme is not None and method is not None and method.scales_inputs:
                attempt.made = Stretch.of(self._some_rows(), scheme, self._inputs, self._tools.backend)

    def _factor(self, attempts: list[Attempt]) -> None:
        """Find the low-rank parts, where a method wants them; a tensor that gains nothing by it does without."""
        for attempt in attempts:
            scheme, method = attempt.decision.scheme, attempt.decision.method
            if scheme is None or method is None or not method.low_rank:
                continue
            low_rank = self._low_rank(method.low_rank)
            codes, backend = method.quantizes_as, self._tools.backend
            if low_rank is not None and low_rank.gains(self._some_rows(), scheme, codes, backend):
                attempt.made = low_rank
            else:
                rule = f"{attempt.decision.rule}; a low-rank part gains nothing: {codes.id} alone"
                attempt.decision = replace(attempt.decision, rule=rule, method=codes)

    def _low_rank(self, rank: int) -> LowRank | None:
        if rank not in self._low_ranks:
            info = self._info
            down = find_down(self._all_rows, info.rows, info.cols, rank, self._inputs)
            self._low_ranks[rank] = None if down is None else LowRank.of(down, self._inputs)
        return self._low_ranks[rank]

    def _group_timesteps(self, attempts: list[Attempt]) -> None:
        """Find the grids for the layer's inputs, in the outputs that are to have some."""
        feed = self._stations.feed
        for attempt in attempts:
            asking = {o: w for o in attempt.outputs if self._decisions[o].time_groups and (w := self._wanted(o))}
            if feed is None or attempt.decision.scheme is None or not asking:
                continue
            with self._tools.clock.during("read"):
                ranges, weights = feed.ranges(self._info, attempt.input_scale)
                is_clipped = any(wanted.is_clipped for wanted in asking.values())
                squares = feed.mean_squares(self._info, attempt.input_scale) if is_clipped else None
            found = {wanted: find_grids(ranges, weights, wanted, squares) for wanted in set(asking.values())}
            attempt.grids = {o: grids for o, wanted in asking.items() if (grids := found[wanted]) is not None}

    def _wanted(self, output: int) -> Wanted | None:
        return self._config(output).time_groups

    def _all_rows(self) -> Iterator[Array]:
        return (self._rows(start, stop) for start, stop in self._blocks())

    def _some_rows(self) -> Array:
        """Rows that are spread over the tensor."""
        return np.concatenate([self._rows(*span) for span in spread(self._info.rows, TRIAL_ROWS)])

    def _find_grids(self, attempts: list[Attempt]) -> None:
        """The extra pass that one scale for a whole tensor takes."""
        wanting = [(a, s) for a in attempts if (s := a.decision.scheme) and s.takes_pass]
        if not wanting:
            return
        seen: dict[Stretch | LowRank | None, Histogram] = {}
        ways = {attempt.made for attempt, _ in wanting}
        for start, stop in self._blocks():
            x = self._rows(start, stop)
            for made in ways:
                block = self._tools.backend.observe(x if made is None else made.apply(x))
                seen[made] = seen[made] + block if made in seen else block
        for attempt, scheme in wanting:
            method, found = attempt.decision.method, seen[attempt.made]
            assert method is not None, "a scheme comes with a method"
            finite = found if found.finite else Histogram.of(np.zeros(1, np.float32))
            attempt.grid = self._tools.backend.tensor_grid(finite, scheme, method.quantizes_as)

    def _write(self, attempts: list[Attempt]) -> None:
        if self._ready:
            # Once: what is not good enough is quantized anew.
            ready, self._ready = self._ready, {}
            for attempt in attempts:
                assert attempt.decision.way is not None, "nothing is copied of what is quantized with others"
                self._take(attempt, ready[attempt.decision.way])
            return
        if all(a.decision.scheme is None for a in attempts):
            self._copy(attempts)
            return
        multiple = max(s.row_multiple for a in attempts if (s := a.decision.scheme))
        for start, stop in row_blocks(self._info, self._tools.block_bytes, multiple):
            x = self._rows(start, stop)
            for attempt in attempts:
                self._write_rows(attempt, x)
            del x  # not held while the next ones are read
            self._stations.meter.within_tensor(self._info.nbytes * stop // self._info.rows)

    def _write_rows(self, attempt: Attempt, x: Array) -> None:
        scheme, method = attempt.decision.scheme, attempt.decision.method
        if scheme is None or method is None:
            raw = np.ascontiguousarray(x).view(np.uint8).reshape(-1).data
            self._behind.put(partial(self._write_raw, attempt.outputs, raw), raw.nbytes)
            return
        # A search can take seconds for a whole block: it goes by slices, so that a cancel is heard in time.
        method = method.quantizes_as
        step = self._tools.backend.slice_bytes(method)
        for start, stop in row_spans(x.shape[0], x.nbytes, step, scheme.row_multiple):
            stop_when(self._tools.cancelled)
            rows = self._quantized(attempt, x[start:stop], scheme, method)
            self._tools.clock.count("quantize", self._bytes_of(stop - start))
            self._take(attempt, rows)

    def _quantized(self, attempt: Attempt, x: Array, scheme: Scheme, method: Method) -> QuantizedRows:
        backend = self._tools.backend
        if attempt.made is not None:
            return attempt.made.quantize(x, scheme, method, attempt.grid, backend)
        return backend.quantize(x, scheme, method, attempt.grid, self._inputs)

    def _take(self, attempt: Attempt, rows: QuantizedRows) -> None:
        attempt.sums += rows.errors
        if attempt.decision.auto_scale:
            attempt.largest_scale = max(attempt.largest_scale, rows.scheme.largest_scale(rows.scale, rows.cols))
        if not rows.errors.finite and any(self._config(o).on_non_finite == "fail" for o in attempt.outputs):
            raise NonFiniteWeights(
                f"tensor {self._info.name} {non_finite(self._info)}; mend it, name it in `skip`,"
                " or set `on_non_finite` to `copy`",
                tensor=self._info.name,
            )
        self._behind.put(partial(self._write_quantized, attempt.outputs, rows), rows.nbytes)

    def _write_quantized(self, outputs: Sequence[int], rows: QuantizedRows) -> None:
        for output in outputs:
            self._stations.writers[output].write_rows(rows)

    def _write_raw(self, outputs: Sequence[int], raw: memoryview) -> None:
        for output in outputs:
            self._stations.writers[output].write_raw(raw)

    def _copy(self, attempts: list[Attempt]) -> None:
        step = self._tools.block_bytes
        for start in range(0, self._info.nbytes, step):
            stop_when(self._tools.cancelled)
            stop = min(start + step, self._info.nbytes)
            with self._tools.clock.during("read", stop - start):
                raw = self._stations.reader.raw(self._info, start, stop)
            for attempt in attempts:
                self._behind.put(partial(self._write_raw, attempt.outputs, raw), raw.nbytes)
            del raw  # not held while the next ones are read
            self._stations.meter.within_tensor(stop)

    def _settle(self, attempts: list[Attempt]) -> dict[int, Decision]:
        """Commit what is good enough; what the other outputs are to try next."""
        again: dict[int, Decision] = {}
        for attempt in attempts:
            for output in attempt.outputs:
                other = judge(attempt, self._info, self._outputs[output], self._stations.warn)
                if other is None:
                    self._behind.put(partial(self._commit, attempt, output))
                else:
                    self._behind.put(self._stations.writers[output].abandon)
                    again[output] = other
        return again

    def _commit(self, attempt: Attempt, output: int) -> None:
        decision, info = attempt.decision, self._info
        scheme = decision.scheme
        grids = attempt.grids.get(output)
        beside = grids.nbytes if grids else 0
        quality = Quality.of(attempt.sums, attempt.stored_bytes(info, scheme) + beside) if scheme else None
        stored = self._stations.writers[output].commit(quality)
        self._tools.clock.count("write", stored)
        seconds = time.monotonic() - self._started
        report = report_of(info, decision, stored, seconds, attempt.sums)
        self._reports[output] = replace(report, time_groups=grids.figures) if grids else report

    def _config(self, output: int) -> ResolvedConfig:
        return self._outputs[output].config

    def _rows(self, start: int, stop: int) -> Array:
        stop_when(self._tools.cancelled)
        with self._tools.clock.during("read", self._bytes_of(stop - start)):
            return self._stations.reader.rows(self._info, start, stop)

    def _bytes_of(self, rows: int) -> int:
        return self._info.nbytes * rows // max(1, self._info.rows)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        return row_blocks(self._info, self._tools.block_bytes)


def report_of(info: TensorInfo, decision: Decision, stored: int, seconds: float, sums: ErrorSums) -> TensorReport:
    """Of a tensor that takes so many bytes in an output; `sums` are of no account where it is copied."""
    scheme, method = decision.scheme, decision.method
    if scheme is None or method is None:
        return TensorReport(info.name, info.shape, info.dtype, "none", decision.rule, info.nbytes, stored, seconds)
    return TensorReport(
        name=info.name,
        shape=info.shape,
        dtype=info.dtype,
        scheme=scheme.id,
        rule=decision.rule,
        original_bytes=info.nbytes,
        stored_bytes=stored,
        seconds=seconds,
        method=method.id,
        bits=scheme.bits,
        symmetric=scheme.symmetric,
        granularity=scheme.granularity,
        group_size=scheme.group_size if scheme.granularity == "group" else None,
        scale_dtype=scheme.scale_dtype,
        sums=sums,
    )


def warn_of_notable(info: TensorInfo, decisions: Sequence[Decision], stations: Stations) -> None:
    """Tell what becomes of a tensor that its user may not expect."""
    for output, decision in zip(stations.outputs, decisions, strict=True):
        if decision.notable:
            code = "group_size_changed" if decision.scheme else "tensor_copied"
            stations.warn(Notice(code, decision.rule, info.name, output.name))
        if decision.missing is not None:
            stations.warn(Notice("calibration_missing", decision.missing, info.name, output.name))
