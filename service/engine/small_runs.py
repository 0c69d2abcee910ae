"""Small tensors, many at once: one read, one call of the backend, one hand-over, and a report for each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from service.engine.backends.base import Backend
from service.engine.completion import GROUP_BYTES
from service.engine.plan import Decision, TensorPlan
from service.engine.publish import stop_when
from service.engine.report import TensorReport
from service.engine.tensor_run import Stations, TensorRun, Tools, Way, warn_of_notable
from service.engine.tensors import FLOAT_DTYPES, Array, TensorInfo

#: A tensor from this size on goes alone.
SMALL_BYTES = 256 << 10
#: As many share a run at most, however few bytes they have.
MOST = 1024


class CopyRun:
    """Copies some tensors into every output; `execute` once."""

    def __init__(self, plans: Sequence[TensorPlan], stations: Stations, tools: Tools) -> None:
        self.plans = plans
        self._stations, self._tools = stations, tools
        self._started = time.monotonic()

    def execute(self) -> None:
        """Have the tensors copied."""
        stop_when(self._tools.cancelled)
        for plan in self.plans:
            warn_of_notable(plan.info, plan.decisions, self._stations)
        data = _read(self.plans, self._stations, self._tools)
        self._stations.behind.put(partial(self._write, data), sum(raw.nbytes for raw in data))

    def _write(self, data: Sequence[memoryview]) -> None:
        # Of the time of all together a like share for each.
        seconds = (time.monotonic() - self._started) / len(self.plans)
        infos = [plan.info for plan in self.plans]
        stored = [writer.copy_all(infos, data) for writer in self._stations.writers]
        self._tools.clock.count("write", sum(map(sum, stored)))
        sizes = zip(*stored, strict=True)
        self._stations.completion.finished(
            *[
                tuple([_copied(p.info, d.rule, size, seconds) for d, size in zip(p.decisions, each, strict=True)])
                for p, each in zip(self.plans, sizes, strict=True)
            ]
        )


class SmallRun:
    """Quantizes some tensors, each output all of them in one way; `execute` once."""

    def __init__(self, plans: Sequence[TensorPlan], stations: Stations, tools: Tools) -> None:
        self.plans = plans
        self._stations, self._tools = stations, tools

    def execute(self) -> None:
        """Have the tensors stored; see `TensorRun.execute`."""
        stop_when(self._tools.cancelled)
        data = _read(self.plans, self._stations, self._tools)
        xs = [_matrix(plan.info, raw) for plan, raw in zip(self.plans, data, strict=True)]
        ways = {decision.way: decision.way for decision in self.plans[0].decisions}
        ready = {way: self._tools.backend.quantize_many(xs, *way) for way in ways if way is not None}
        self._tools.clock.count("quantize", len(ready) * sum(raw.nbytes for raw in data))
        for index, plan in enumerate(self.plans):
            quantized = {way: rows[index] for way, rows in ready.items()}
            TensorRun(plan, self._stations, self._tools, quantized).execute()


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
        these = found if plan.info.nbytes < SMALL_BYTES else None
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
    in_one_pass = all(way is not None and way[0].granularity != "tensor" for way in ways)
    return ways if is_copied or in_one_pass else None


def _most_bytes(ways: Ways, backend: Backend) -> int:
    """How many bytes may share a run: as are worth it, and no more than are computed while nobody waits for a stop."""
    slices = [backend.slice_bytes(way[1]) for way in ways if way is not None]
    return max(backend.batch_bytes, min(GROUP_BYTES, *slices)) if slices else GROUP_BYTES


def _together(plans: Sequence[TensorPlan], stations: Stations, tools: Tools) -> CopyRun | SmallRun:
    kind = SmallRun if plans[0].decisions[0].scheme else CopyRun
    return kind(plans, stations, tools)


def _read(plans: Sequence[TensorPlan], stations: Stations, tools: Tools) -> list[memoryview]:
    with tools.clock.during("read", sum(plan.info.nbytes for plan in plans)):
        return stations.reader.raws([plan.info for plan in plans])


def _matrix(info: TensorInfo, raw: memoryview) -> Array:
    return np.frombuffer(raw, FLOAT_DTYPES[info.dtype]).reshape(info.rows, info.cols)


def _copied(info: TensorInfo, rule: str, stored: int, seconds: float) -> TensorReport:
    return TensorReport(
        name=info.name,
        shape=info.shape,
        dtype=info.dtype,
        scheme="none",
        rule=rule,
        original_bytes=info.nbytes,
        stored_bytes=stored,
        seconds=seconds,
    )
