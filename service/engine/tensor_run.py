"""One tensor through all outputs: read once, quantize each way that is asked for, check, fall back.

Writers are called in another thread, which writes what is quantized while the next rows are; so nothing is asked of
them here, and each call is put behind the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from service.engine.activation_groups import ActivationGrids, Wanted, find_grids
from service.engine.backends.base import Backend, Grid
from service.engine.beside import Beside
from service.engine.calibration.feed import Feed
from service.engine.clock import Clock
from service.engine.completion import Completion
from service.engine.config import ResolvedConfig
from service.engine.equalise import TRIAL_ROWS, Stretch
from service.engine.formats.base import Format, ModelReader, ModelWriter
from service.engine.histogram import Histogram
from service.engine.inputs import LayerInputs
from service.engine.low_rank import LowRank, find_down
from service.engine.meter import Meter
from service.engine.methods.base import Method
from service.engine.metrics import ErrorSums, Quality
from service.engine.plan import Decision, OutputPlan, TensorPlan, with_scale
from service.engine.progress import Cancelled, Notice, Report
from service.engine.publish import stop_when
from service.engine.report import TensorReport
from service.engine.sampling import spread
from service.engine.schemes.base import BLOCK, ROW_MULTIPLE, SCALE_RANGES, Scheme
from service.engine.schemes.nested import NestedScheme
from service.engine.schemes.registry import build_scheme, schemes
from service.engine.tensors import Array, FloatArray, QuantizedRows, TensorInfo, low_rank_bytes, non_finite
from service.engine.write_behind import WriteBehind
from service.errors import AccuracyTooLow, NonFiniteWeights

#: Widths that `on_failure: fallback` climbs.
FALLBACK_BITS = (2, 3, 4, 6, 8)

Warn = Callable[[Notice], None]
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


@dataclass(slots=True)
class _Attempt:
    """One way to store the tensor, for all outputs that want it so."""

    decision: Decision
    outputs: list[int]
    sums: ErrorSums = field(default_factory=ErrorSums)
    largest_scale: float = 0.0
    grid: Grid | None = None
    made: Stretch | LowRank | None = None  # what is done to the weights before
    grids: dict[int, ActivationGrids] = field(default_factory=dict)  # by output

    @property
    def input_scale(self) -> FloatArray | None:
        """What the layer's inputs are divided by, if they are."""
        return self.made.scale if isinstance(self.made, Stretch) else None

    def beside(self, output: int) -> Beside | None:
        """What an output stores beside the codes."""
        grids = self.grids.get(output)
        if grids is None and self.made is None:
            return None
        return Beside(
            input_scale=self.input_scale,
            time_group_bounds=grids.bounds if grids else None,
            activation_scale=grids.scale if grids else None,
            activation_zero_point=grids.zero_point if grids else None,
            low_rank_down=self.made.down if isinstance(self.made, LowRank) else None,
        )

    def stored_bytes(self, info: TensorInfo, scheme: Scheme) -> int:
        """What the tensor takes in this scheme with all that is beside its codes."""
        if isinstance(self.made, LowRank):
            return scheme.stored_bytes(info.rows, info.cols) + low_rank_bytes(info.rows, info.cols, len(self.made.down))
        return scheme.stored_bytes(info.rows, info.cols) + (0 if self.made is None else self.made.scale.nbytes)


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
        attempts = _grouped(dict(enumerate(self._decisions)))
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
            attempts = _grouped(self._settle(attempts))
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

    def _stretch(self, attempts: list[_Attempt]) -> None:
        """Find what the layer's inputs are divided by, where a method wants that."""
        if self._inputs is None:
            return
        for attempt in attempts:
            scheme, method = attempt.decision.scheme, attempt.decision.method
            if scheme is not None and method is not None and method.scales_inputs:
                attempt.made = Stretch.of(self._some_rows(), scheme, self._inputs, self._tools.backend)

    def _factor(self, attempts: list[_Attempt]) -> None:
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

    def _group_timesteps(self, attempts: list[_Attempt]) -> None:
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

    def _find_grids(self, attempts: list[_Attempt]) -> None:
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

    def _write(self, attempts: list[_Attempt]) -> None:
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

    def _write_rows(self, attempt: _Attempt, x: Array) -> None:
        scheme, method = attempt.decision.scheme, attempt.decision.method
        if scheme is None or method is None:
            raw = np.ascontiguousarray(x).view(np.uint8).reshape(-1).data
            self._behind.put(partial(self._write_raw, attempt.outputs, raw), raw.nbytes)
            return
        # A search can take seconds for a whole block: it goes by slices, so that a cancel is heard in time.
        method = method.quantizes_as
        step = self._tools.backend.slice_bytes(method)
        for start, stop in _row_spans(x.shape[0], x.nbytes, step, scheme.row_multiple):
            stop_when(self._tools.cancelled)
            rows = self._quantized(attempt, x[start:stop], scheme, method)
            self._tools.clock.count("quantize", self._bytes_of(stop - start))
            self._take(attempt, rows)

    def _quantized(self, attempt: _Attempt, x: Array, scheme: Scheme, method: Method) -> QuantizedRows:
        backend = self._tools.backend
        if attempt.made is not None:
            return attempt.made.quantize(x, scheme, method, attempt.grid, backend)
        return backend.quantize(x, scheme, method, attempt.grid, self._inputs)

    def _take(self, attempt: _Attempt, rows: QuantizedRows) -> None:
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

    def _copy(self, attempts: list[_Attempt]) -> None:
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

    def _settle(self, attempts: list[_Attempt]) -> dict[int, Decision]:
        """Commit what is good enough; what the other outputs are to try next."""
        again: dict[int, Decision] = {}
        for attempt in attempts:
            for output in attempt.outputs:
                other = self._judge(attempt, output, self._stations.warn)
                if other is None:
                    self._behind.put(partial(self._commit, attempt, output))
                else:
                    self._behind.put(self._stations.writers[output].abandon)
                    again[output] = other
        return again

    def _judge(self, attempt: _Attempt, output: int, warn: Warn) -> Decision | None:
        """What to try instead, or None when the attempt stands."""
        scheme = attempt.decision.scheme
        if scheme is None:
            return None
        config, name, where = self._config(output), self._info.name, self._outputs[output].name
        if not attempt.sums.finite:
            warn(Notice("non_finite_copied", f"{non_finite(self._info)}: copied as it was", name, where))
            return Decision(non_finite(self._info))
        if attempt.decision.auto_scale and not fits_scale(scheme, attempt.largest_scale):
            wide = with_scale(scheme, "F32")
            text = f"its scales are out of the range of {scheme.scale_dtype}: they are stored in F32"
            warn(Notice("scale_widened", text, name, where))
            return replace(attempt.decision, rule=f"{attempt.decision.rule}; {text}", scheme=wide)
        missed = missed_accuracy(attempt.sums, scheme, config)
        if missed is None:
            return None
        if config.on_failure == "fail":
            raise AccuracyTooLow(
                f"tensor {name}: {missed}; give it more bits with `layers`, lower `min_accuracy`,"
                " or set `on_failure` to `fallback` or `warn`",
                tensor=name,
            )
        if config.on_failure == "warn":
            warn(Notice("accuracy_missed", missed, name, where))
            return None
        wider = _wider(scheme, self._info, self._outputs[output].format)
        if wider is None or attempt.stored_bytes(self._info, wider) >= self._info.nbytes:
            warn(Notice("fallback_copied", f"{missed}: copied as it was", name, where))
            return Decision(f"{missed}: copied")
        warn(Notice("fallback_taken", f"{missed}: {wider.id} instead", name, where))
        return replace(attempt.decision, rule=f"{missed}: {wider.id} instead", scheme=wider)

    def _commit(self, attempt: _Attempt, output: int) -> None:
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


def row_blocks(info: TensorInfo, block_bytes: int, multiple: int = ROW_MULTIPLE) -> Iterator[tuple[int, int]]:
    """(start, stop) of row blocks of about `block_bytes` of source, each but the last of a multiple of some rows."""
    return _row_spans(info.rows, info.nbytes, block_bytes, multiple)


def _row_spans(rows: int, nbytes: int, span_bytes: int, multiple: int) -> Iterator[tuple[int, int]]:
    row_bytes = max(1, nbytes // max(1, rows))
    step = max(1, span_bytes // row_bytes // multiple) * multiple
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _grouped(decisions: dict[int, Decision]) -> list[_Attempt]:
    """Outputs that store the tensor in the same way share the work."""
    attempts: dict[tuple[object, object], _Attempt] = {}
    for output, decision in sorted(decisions.items()):
        key = (decision.scheme, decision.method)
        attempts.setdefault(key, _Attempt(decision, [])).outputs.append(output)
    return list(attempts.values())


def missed_accuracy(sums: ErrorSums, scheme: Scheme, config: ResolvedConfig) -> str | None:
    """Why these errors are too large, or None."""
    floor = config.min_accuracy or 0.0
    if sums.accuracy < floor:
        of = " of the output" if sums.has_output else ""
        return f"cosine similarity {sums.accuracy:.4f}{of} with {scheme.id} misses min_accuracy {floor:g}"
    if not sums.keeps_magnitude:
        what, error = ("output", sums.output_relative_error) if sums.has_output else ("weights", sums.relative_error)
        return f"{scheme.id} does not keep the magnitude of the {what} (relative error {error:.3g})"
    return None


def fits_scale(scheme: Scheme, largest: float) -> bool:
    """Whether scales of up to this size are stored with all the digits of their dtype."""
    smallest_normal, limit = SCALE_RANGES[scheme.scale_dtype]
    return smallest_normal <= largest < limit


def _wider(scheme: Scheme, info: TensorInfo, format_: type[Format]) -> Scheme | None:
    """The same granularity at the next width that the format holds, or None behind the last: as integers, with nested
    scales where these were.

    Integers have groups of a row in place of blocks, and scales of the usual dtype in place of small ones.
    """
    parameters = scheme.model_dump(include={"granularity", "group_size", "scale_dtype"})
    if scheme.granularity == "block":
        parameters |= {"granularity": "group", "group_size": BLOCK}
    for bits in FALLBACK_BITS:
        if bits > scheme.bits:
            nested = f"int{bits}_nested"
            id_ = nested if isinstance(scheme, NestedScheme) and nested in schemes() else f"int{bits}"
            if scheme.scale_dtype not in schemes()[id_].choices("scale_dtype"):
                parameters["scale_dtype"] = schemes()[id_].usual_scale(info.dtype)
            wider = build_scheme(id_, symmetric=scheme.symmetric, **parameters)
            if format_.refuses_tensor(info, wider) is None:
                return wider
    return None
