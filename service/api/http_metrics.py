"""What is counted of HTTP calls. Labels take few values, whatever clients send: templates of routes, known methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE"})
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class HttpMetrics:
    """Counters and histograms of calls; changed on the event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["method", "route", "status"]
        self._requests = Counter("arrowquant_http_requests", "Calls that were answered.", labels, registry=registry)
        self._seconds = Histogram(
            "arrowquant_http_request_seconds",
            "From a call to the end of its answer; without streams, downloads, uploads and calls that asked to wait.",
            labels,
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._problems = Counter(
            "arrowquant_http_problems", "Calls that were answered with a problem.", ["code"], registry=registry
        )
        #: Calls that are being answered.
        self.in_flight = Gauge(
            "arrowquant_http_requests_in_flight", "Calls that are being answered.", registry=registry
        )

    def answered(self, call: Mapping[str, Any], seconds: float | None, problem: str | None) -> None:
        """A call was answered: its `method`, `route` and `status`; no `seconds` where they mean nothing."""
        method = call["method"] if call["method"] in METHODS else "other"
        labels = (method, call["route"], str(call["status"]))
        self._requests.labels(*labels).inc()
        if seconds is not None:
            self._seconds.labels(*labels).observe(seconds)
        if problem is not None:
            self._problems.labels(problem).inc()
