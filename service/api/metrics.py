"""All metrics of one server: those of jobs and calls, which are counted as they happen, and what is looked up."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pyarrow as pa
from prometheus_client import Gauge, Histogram, Info
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from service import __version__
from service.api.http_metrics import HttpMetrics
from service.api.stalls import StallMonitor
from service.jobs.manager import JobManager
from service.jobs.metrics import FiguresCollector

#: Two scrapes within this time show the same figures: whoever asks all the time costs no more.
HOLD_S = 1.0
_DELAYS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1)
_STATUS = Path("/proc/self/status")


class Metrics:
    """Made before the server starts, on the registry of its jobs; `gather` comes before each scrape."""

    def __init__(self, manager: JobManager, stalls: StallMonitor, *, by_tenant: bool) -> None:
        """`by_tenant` shows figures of single tenants."""
        self.registry = manager.watch.metrics.registry
        self.http = HttpMetrics(self.registry)
        self._manager = manager
        self._stalls = stalls
        self._collector = FiguresCollector(by_tenant=by_tenant)
        self._gathering = asyncio.Lock()
        self._gathered_at = -HOLD_S
        self._register()

    def _register(self) -> None:
        registry = self.registry
        registry.register(self._collector)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        build = Info("arrowquant_build", "The version that runs.", registry=registry)
        build.info({"version": __version__})
        late = "By how much the event loop was late, looked at fifty times a second."
        delays = Histogram("arrowquant_event_loop_late_seconds", late, buckets=_DELAYS_S, registry=registry)
        self._stalls.observe = delays.observe
        for name, text, look in (
            ("event_loop_stall_seconds", "The longest stall of the last minute.", lambda: self._stalls.longest_s),
            ("anonymous_memory_bytes", "Memory that is the process's own, mapped files left out.", _anonymous_bytes),
            ("arrow_memory_bytes", "What Arrow has allocated.", pa.total_allocated_bytes),
        ):
            Gauge(f"arrowquant_{name}", text, registry=registry).set_function(look)

    async def gather(self) -> None:
        """Look up what is not counted as it happens; in threads, except for what lies in memory."""
        async with self._gathering:
            if time.monotonic() - self._gathered_at >= HOLD_S:
                self._collector.figures = await self._manager.figures()
                self._gathered_at = time.monotonic()


def _anonymous_bytes() -> float:
    """RssAnon; 0 where the kernel does not tell."""
    if not _STATUS.exists():
        return 0.0
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return next((float(words[1]) * 1024 for words in lines if words and words[0] == "RssAnon:"), 0.0)
