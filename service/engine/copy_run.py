"""Small tensors that every output copies, many at once: one read, one hand-over, and a report for each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

from service.engine.completion import GROUP_BYTES
from service.engine.plan import TensorPlan
from service.engine.publish import stop_when
from service.engine.report import TensorReport
from service.engine.tensor_run import Stations, TensorRun, Tools, warn_of_notable

#: A tensor from this size on goes alone.
SMALL_BYTES = 256 << 10
#: As many share a run at most, however few bytes they have.
MOST = 1024


def runs(plans: Sequence[TensorPlan], stations: Stations, tools: Tools) -> Iterator[TensorRun | CopyRun]:
    """What to execute for these tensors in their order: small ones that are copied go together, all others alone."""
    together: list[TensorPlan] = []
    nbytes = 0
    for plan in plans:
        is_small = plan.info.nbytes < SMALL_BYTES and all(d.scheme is None for d in plan.decisions)
        if together and (not is_small or nbytes + plan.info.nbytes > GROUP_BYTES or len(together) == MOST):
            yield CopyRun(together, stations, tools)
            together, nbytes = [], 0
        if is_small:
            together.append(plan)
            nbytes += plan.info.nbytes
        else:
            yield TensorRun(plan, stations, tools)
    if together:
        yield CopyRun(together, stations, tools)


class CopyRun:
    """Copies some tensors; `execute` once."""

    def __init__(self, plans: Sequence[TensorPlan], stations: Stations, tools: Tools) -> None:
        self.plans = plans
        self._stations, self._tools = stations, tools
        self._started = time.monotonic()

    def execute(self) -> None:
        """Have the tensors copied into every output."""
        stations, infos = self._stations, [plan.info for plan in self.plans]
        stop_when(self._tools.cancelled)
        for plan in self.plans:
            warn_of_notable(plan.info, plan.decisions, stations)
        nbytes = sum(info.nbytes for info in infos)
        with self._tools.clock.during("read", nbytes):
            data = stations.reader.raws(infos)
        stations.behind.put(partial(self._write, data), nbytes)

    def _write(self, data: Sequence[memoryview]) -> None:
        writers, count = self._stations.writers, self._tools.clock.count
        # Of all together, a like share for each.
        seconds = (time.monotonic() - self._started) / len(self.plans)
        for plan, raw in zip(self.plans, data, strict=True):
            info = plan.info
            reports = []
            for writer, decision in zip(writers, plan.decisions, strict=True):
                writer.begin(info, None)
                writer.write_raw(raw)
                stored = writer.commit(None)
                count("write", stored)
                reports.append(
                    TensorReport(
                        name=info.name,
                        shape=info.shape,
                        dtype=info.dtype,
                        scheme="none",
                        rule=decision.rule,
                        original_bytes=info.nbytes,
                        stored_bytes=stored,
                        seconds=seconds,
                    )
                )
            self._stations.completion.finished(tuple(reports))
