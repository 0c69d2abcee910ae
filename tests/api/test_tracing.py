"""Traces, taken in by a real OTLP collector: from the client's call to the tensors, and across a restart."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from service.jobs.traces import FIRST_TENSORS
from tests.api.conftest import LAYERS, save_model
from tests.conftest import StartServer
from tests.server import Json, Server, body

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}


class Collector:
    """Takes in OTLP over HTTP on loopback; `stalls` makes it never answer."""

    def __init__(self, *, stalls: bool = False) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.arrived = threading.Event()
        self.over = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    content = gzip.decompress(content)
                assert self.path == "/v1/traces"
                collector.requests.append(ExportTraceServiceRequest.FromString(content))
                collector.arrived.set()
                if stalls:
                    collector.over.wait()
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                del args

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def spans(self) -> list[Span]:
        """All spans that have come."""
        scopes = (scope for r in self.requests for resource in r.resource_spans for scope in resource.scope_spans)
        return [span for scope in scopes for span in scope.spans]

    def named(self, name: str) -> list[Span]:
        """The spans of a name."""
        return [span for span in self.spans if span.name == name]

    def close(self) -> None:
        """End."""
        self.over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that servers started in this test send to."""
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    yield collector
    collector.close()


def submit(server: Server, asked: Json) -> Json:
    job: Json = server.client.post("/v1/jobs", json=asked, headers=TRACEPARENT).json()
    return job


def attributes(span: Span) -> dict[str, object]:
    return {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}


def test_a_trace_leads_from_the_callers_span_to_each_tensor(
    start_server: StartServer, collector: Collector, model: Path
) -> None:
    server = start_server(log_format="json")
    job = submit(server, body(model, "parquet"))
    done = server.finish(job["id"])
    server.stop()
    [post] = collector.named("POST /v1/jobs")
    assert (post.trace_id.hex(), post.parent_span_id.hex()) == (TRACE, CALLER)
    assert post.kind == Span.SPAN_KIND_SERVER
    assert attributes(post) == {
        "http.request.method": "POST", "http.route": "/v1/jobs", "url.path": "/v1/jobs",
        "http.response.status_code": 202,
    }  # fmt: skip
    [traced] = collector.named("job quantize")
    assert traced.parent_span_id == post.span_id
    found = attributes(traced)
    assert (found["arrowquant.job_id"], found["arrowquant.status"]) == (job["id"], "succeeded")
    assert found["arrowquant.quantize_s"] == pytest.approx(done["times"]["quantize_s"])
    tensors = collector.named("tensor")
    assert {attributes(t)["arrowquant.tensor"] for t in tensors} == {f"blocks.{i}.weight" for i in range(LAYERS)}
    assert all(attributes(t)["arrowquant.bytes_in"] == 64 * 256 * 4 for t in tensors)
    children = [*tensors, *collector.named("queue"), *collector.named("publish")]
    assert len(children) == LAYERS + 2
    for span in children:
        assert (span.parent_span_id, span.trace_id) == (traced.span_id, traced.trace_id)
        assert span.start_time_unix_nano <= span.end_time_unix_nano
    assert f"00-{TRACE}-{post.span_id.hex()}-01" in server.log, "lines of the log name the trace"
    names = {span.name for span in collector.spans}
    assert not names & {"GET /readyz", "GET"}, "probes are not traced"
    resource = collector.requests[0].resource_spans[0].resource
    assert {a.key: a.value.string_value for a in resource.attributes}["service.name"] == "arrowquant"


def test_a_job_that_another_server_ends_stays_in_its_trace(
    start_server: StartServer, collector: Collector, model_root: Path
) -> None:
    server = start_server()
    long = save_model(model_root / "traced", layers=300)
    job = submit(server, body(long, "parquet", method="mse", backend="reference"))
    server.wait_for(job["id"], "tensor.completed")
    server.kill()
    server.start()
    server.finish(job["id"])
    server.stop()
    [traced] = collector.named("job quantize")
    assert traced.trace_id.hex() == TRACE
    tensors = [t for t in collector.named("tensor") if t.parent_span_id == traced.span_id]
    assert 0 < len(tensors) <= FIRST_TENSORS
    assert attributes(traced)["arrowquant.tensors_without_span"] > 0


def test_a_failed_job_says_why(start_server: StartServer, collector: Collector, model_root: Path) -> None:
    server = start_server()
    model = save_model(model_root / "changed")
    asked = body(model, "parquet", min_accuracy=1.0, bit_width=2, on_failure="fail")
    job = submit(server, asked)
    assert server.finish(job["id"])["error"]["code"] == "accuracy_too_low"
    server.client.get("/v1/jobs/job_nobody")
    server.stop()
    [traced] = collector.named("job quantize")
    assert attributes(traced)["error.type"] == "accuracy_too_low"
    assert traced.status.code == 2
    [missing] = collector.named("GET /v1/jobs/{job_id}")[-1:]
    assert attributes(missing)["error.type"] == "not_found"


def test_a_collector_that_does_not_answer_holds_up_neither_calls_nor_the_exit(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    collector = Collector(stalls=True)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.url}/v1/traces")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    try:
        server = start_server()
        submit(server, body(model, "parquet"))
        assert collector.arrived.wait(60)
        assert server.run(body(model, "parquet"))["status"] == "succeeded"
        server.stop()
    finally:
        collector.close()


def test_without_an_exporter_nothing_of_it_is_imported() -> None:
    # The framework imports the API by itself where it is installed.
    code = (
        "import sys, os; os.environ.pop('OTEL_EXPORTER_OTLP_ENDPOINT', None)\n"
        "from service.api.tracing import make_tracing\n"
        "import service.api.server\n"
        "assert make_tracing(os.environ) is None\n"
        "assert make_tracing({'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://x', 'OTEL_SDK_DISABLED': 'true'}) is None\n"
        "heavy = ('opentelemetry.sdk', 'opentelemetry.exporter', 'service.jobs.traces')\n"
        "print(sorted(name for name in sys.modules if name.startswith(heavy)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "missing", ["opentelemetry.exporter", "opentelemetry.exporter.otlp.proto.http", "opentelemetry.sdk"]
)
def test_without_all_of_its_libraries_the_server_goes_without_traces(missing: str) -> None:
    code = (
        "import sys\n"
        "class Hiding:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.startswith({missing!r}):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hiding())\n"
        "from service.api.tracing import make_tracing\n"
        "assert make_tracing({'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://x'}) is None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "arrowquant-service[otel]" in done.stderr
