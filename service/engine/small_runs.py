"""Small tensors, many at once: one read, one call of the backend, one hand-over, and a report for each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from service.engine.backends.base import Backend
from service.engine.completion import GROUP_BYTES
from service.engine.metrics import ErrorSums
from service.engine.plan import Decision, TensorPlan
from service.engine.progress import Notice
from service.engine.publish import stop_when
from service.engine.schemes.base import SCALE_RANGES
from service.engine.tensor_run import (
    Stations,
    TensorRun,
    Tools,
    Way,
    report_of,
    warn_of_notable,
)
from service.engine.tensors import FLOAT_DTYPES, Array, QuantizedRows, TensorInfo
from service.engine.verdict import fits_scale, missed_accuracy

#: A tensor from this size on goes alone.
SMALL_BYTES = 256 << 10
#: As many share a run at most, however few bytes they have.
MOST = 1024


class _Together:
    """Some tensors that are finished together."""

    def __init__(self, plans: Sequence[TensorPlan], stations: Stations, tools: Tools) -> None:
        self.plans = plans
        self._stations, self._tools = stations, tools
        self._started = time.monotonic()

    def _finish(
        self, plans: Sequence[TensorPlan], stored: Sequence[Sequence[int]], sums: Sequence[Sequence[ErrorSums]]
    ) -> None:
        """They are whole: `stored` has the bytes of each in each output, `sums` the errors likewise."""
        # Of the time of all together a like share for each.
        seconds = (time.monotonic() - self._started) / len(self.plans)
        self._tools.clock.count("write", sum(map(sum, stored)))
        reports = [
            [
                report_of(plan.info, plan.decisions[output], nbytes, seconds, errors)
                for plan, nbytes, errors in zip(plans, *found, strict=True)
            ]
            for output, found in enumerate(zip(stored, sums, strict=True))
        ]
        self._stations.completion.finished(*zip(*reports, strict=True))


class CopyRun(_Together):
    """Copies some tensors into every output; `execute` once."""

    def execute(self) -> None:
        """Have the tensors copied."""
        stop_when(self._tools.cancelled)
        for plan in self.plans:
            warn_of_notable(plan.info, plan.decisions, self._stations)
        data = _read(self.plans, self._stations, self._tools)
        self._stations.behind.put(partial(self._write, data), sum(raw.nbytes for raw in data))

    def _write(self, data: Sequence[memoryview]) -> None:
        infos = [plan.info for plan in self.plans]
        stored = [writer.copy_all(infos, data) for writer in self._stations.writers]
        self._finish(self.plans, stored, [[ErrorSums()] * len(infos)] * len(stored))


class SmallRun(_Together):
    """Quantizes some tensors, each output all of them in one way; `execute` once."""

    def execute(self) -> None:
        """Have the tensors stored; see `TensorRun.execute`."""
        stop_when(self._tools.cancelled)
        data = _read(self.plans, self._stations, self._tools)
        xs = [_matrix(plan.info, raw) for plan, raw in zip(self.plans, data, strict=True)]
        ways = list(dict.fromkeys(decision.way for decision in self.plans[0].decisions))
        ready = [self._tools.backend.quantize_many(xs, *way) for way in ways if way is not None]
        self._tools.clock.count("quantize", len(ready) * sum(raw.nbytes for raw in data))
        each_output = [ready[ways.index(decision.way)] for decision in self.plans[0].decisions]
        self._put_all(list(zip(*each_output, strict=True)))

    def _put_all(self, found: Sequence[tuple[QuantizedRows, ...]]) -> None:
        """Hand on what came of each tensor, for each output; those that stand together, up to one that does not."""
        for text in self._tools.backend.take_notices():
            self._stations.warn(Notice("device_lacking", text, self.plans[0].info.name))
        fits = zip(*(_fit(rows) for rows in zip(*found, strict=True)), strict=True)
        first = 0
        for index, (plan, rows, fitting) in enumerate(zip(self.plans, found, fits, strict=True)):
            if not self._stand(plan.decisions, rows, fitting):
                self._put(first, index, found)
                ready = {decision.way: q for decision, q in zip(plan.decisions, rows, strict=True) if decision.way}
                TensorRun(plan, self._stations, self._tools, ready).execute()
                first = index + 1
        self._put(first, len(found), found)

    def _stand(self, decisions: Sequence[Decision], rows: Sequence[QuantizedRows], fitting: Sequence[bool]) -> bool:
        """Whether nothing has to be told or done anew in any output."""
        return all(
            q.errors.finite
            and (fits or not decision.auto_scale)
            and missed_accuracy(q.errors, q.scheme, output.config) is None
            for decision, q, fits, output in zip(decisions, rows, fitting, self._stations.outputs, strict=True)
        )

    def _put(self, first: int, last: int, found: Sequence[tuple[QuantizedRows, ...]]) -> None:
        plans, rows = self.plans[first:last], found[first:last]
        for plan in plans:
            warn_of_notable(plan.info, plan.decisions, self._stations)
        if plans:
            nbytes = sum([q.nbytes for each in rows for q in each])
            self._stations.behind.put(partial(self._write, plans, list(zip(*rows, strict=True))), nbytes)

    def _write(self, plans: Sequence[TensorPlan], rows: Sequence[Sequence[QuantizedRows]]) -> None:
        infos = [plan.info for plan in plans]
        stored = [
            writer.store_all(list(zip(infos, each, strict=True)))
            for writer, each in zip(self._stations.writers, rows, strict=True)
        ]
        self._finish(plans, stored, [[q.errors for q in each] for each in rows])


def _fit(rows: Sequence[QuantizedRows]) -> Sequence[bool]:
    """Whether the scales of each have all the digits of their dtype."""
    scheme = rows[0].scheme
    if SCALE_RANGES[scheme.scale_dtype] == (0.0, math.inf):
        return [True] * len(rows)
    if rows[0].scale.dtype.itemsize != 2:
        return [fits_scale(scheme, scheme.largest_scale(q.scale, q.cols)) for q in rows]
    # Of two bytes, and none is negative: as whole numbers, for NumPy is slow with their dtype.
    scales = [q.scale.reshape(-1).view(np.uint16) for q in rows]
    starts = np.cumsum([0, *(scale.size for scale in scales[:-1])])
    largest = np.maximum.reduceat(np.concatenate(scales), starts).view(rows[0].scale.dtype)
    return [fits_scale(scheme, scale) for scale in largest.astype(np.float32).tolist()]


Run = TensorRun | CopyRun | SmallRun


def runs(plans: Sequence[TensorPlan], stations: Stations, tools: Tools) -> Iterator[Run]:
    """What to execute for these tensors in their order: small ones together that are treated alike, others alone."""
    together: list[TensorPlan] = []
    ways: Ways | None = None
    nbytes = most_bytes = 0
    decisions: tuple[Decision, ...] = ()
    found: Ways | None = None
    for plan in plans:
        if plan.decisions != decisions:
            decisions, found = plan.decisions, _ways(plan.decisions)
        these = found if plan.info.nbytes < SMALL_BYTES and not plan.is_fed else None
        if together and (these != ways or nbytes + plan.info.nbytes > most_bytes or len(together) == MOST):
            yield _together(together, stations, tools)
            together, nbytes = [], 0
        if these is None:
            yield TensorRun(plan, stations, tools)
        else:
            if not together:
                ways, most_bytes = these, _most_bytes(these, tools.backend)
            together.append(plan)
            nbytes += plan.info.nbytes
    if together:
        yield _together(together, stations, tools)


Ways = tuple[Way | None, ...]


def _ways(decisions: Sequence[Decision]) -> Ways | None:
    """How each output stores a tensor that may share a run with others if it is small, or None."""
    ways = tuple(decision.way for decision in decisions)
    is_copied = not any(ways)
    in_one_pass = all(way is not None and not way[0].takes_pass and not way[1].low_rank for way in ways)
    return ways if is_copied or in_one_pass else None


def _most_bytes(ways: Ways, backend: Backend) -> int:
    """How many bytes may share a run: as are worth it, and no more than are computed while nobody waits for a stop."""
    slices = [backend.slice_bytes(way[1]) for way in ways if way is not None]
    return max(backend.batch_bytes, min(GROUP_BYTES, *slices)) if slices else GROUP_BYTES


def _together(plans: Sequence[TensorPlan], stations: Stations, tools: Tools) -> CopyRun | SmallRun:
    kind: type[CopyRun | SmallRun] = SmallRun if plans[0].decisions[0].scheme else CopyRun
    return kind(plans, stations, tools)


def _read(plans: Sequence[TensorPlan], stations: Stations, tools: Tools) -> list[memoryview]:
    with tools.clock.during("read", sum(plan.info.nbytes for plan in plans)):
        return stations.reader.raws([plan.info for plan in plans])


def _matrix(info: TensorInfo, raw: memoryview) -> Array:
    return np.frombuffer(raw, FLOAT_DTYPES[info.dtype]).reshape(info.rows, info.cols)
