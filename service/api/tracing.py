"""OpenTelemetry traces, where the standard variables name an exporter; nothing of it is imported elsewhere.

`OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` switch them on; the other `OTEL_` variables mean
what OpenTelemetry says. Spans go out over HTTP in a thread of their own; what cannot be sent is dropped.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import Scope

from service import __version__
from service.jobs.threads import run_in_thread

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from service.jobs.traces import JobTraces

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
#: The exporter does not come with the SDK, which others install as well.
LIBRARIES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
#: How long the last spans may take to go out when the server ends.
FLUSH_S = 2.0


def make_tracing(environment: Mapping[str, str]) -> Tracing | None:
    """Tracing as the variables ask for it; None when they do not, or when the extra `otel` is not installed."""
    asked = any(environment.get(name) for name in ENDPOINTS)
    off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not asked or off or environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return None
    if not all(map(_is_installed, LIBRARIES)):
        log.warning("traces are asked for, and the libraries are missing: install arrowquant-service[otel]")
        return None
    return Tracing()


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that it lies in
        return False


class Tracing:
    """A provider of its own, so that nothing of OpenTelemetry is global."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        from service.jobs.traces import JobTraces

        resource = Resource.create({"service.version": __version__})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "arrowquant"}))
        self._provider: TracerProvider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("arrowquant", __version__)
        self._propagator = TraceContextTextMapPropagator()
        #: For those who change jobs.
        self.jobs: JobTraces = JobTraces(self._tracer)

    def begin(self, scope: Scope) -> CallSpan:
        """The span of a call, in the trace that its `traceparent` names, or in a new one."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, set_span_in_context

        headers = Headers(scope=scope)
        given = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        parent = self._propagator.extract(given, Context())
        span = self._tracer.start_span(scope["method"], parent, SpanKind.SERVER)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span, Context()))
        return CallSpan(span, carrier.get("traceparent"))

    async def close(self) -> None:
        """Send what is left, for a moment; a collector that does not answer holds up no exit."""

        def flush() -> None:
            self._provider.force_flush(int(FLUSH_S * 1000))
            self._provider.shutdown()

        with suppress(TimeoutError):
            await asyncio.wait_for(run_in_thread(flush, "traces"), FLUSH_S)


class CallSpan:
    """The span of one call. `traceparent` is what it is for those that it causes."""

    def __init__(self, span: Span, traceparent: str | None) -> None:
        self._span = span
        self.traceparent = traceparent

    def end(self, fields: Mapping[str, str | int | float], problem: str | None) -> None:
        """The call was answered; `fields` as the log has them."""
        from opentelemetry.trace import StatusCode

        self._span.update_name(f"{fields['method']} {fields['route']}")
        for name, field in (
            ("http.request.method", "method"),
            ("http.route", "route"),
            ("url.path", "path"),
            ("http.response.status_code", "status"),
        ):
            self._span.set_attribute(name, fields[field])
        if problem is not None:
            self._span.set_attribute("error.type", problem)
        if int(fields["status"]) >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
