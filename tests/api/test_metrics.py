"""Metrics: both formats, what moves when something happens, labels that clients cannot multiply, tenants for admins."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from service.jobs.api_keys import Scope
from service.jobs.figures import Figures, Stored
from service.jobs.metrics import OTHERS, TENANTS_SHOWN, FiguresCollector
from tests.api.conftest import LAYERS, save_model
from tests.api.keyed import Keyed
from tests.api.scraping import Scrape, scrape, scrape_openmetrics
from tests.api.test_jobs import large_model
from tests.conftest import StartServer
from tests.server import Json, Server, body, validation

MODEL_BYTES = LAYERS * 64 * 256 * 4


def seconds(job: Json) -> float:
    """How long the parts of a job's time are together, the queue left out."""
    return sum(spent for part, spent in job["times"].items() if part != "queue_s")


def test_both_formats_say_the_same(server: Server, finished: Json) -> None:
    text, strict = scrape(server.client), scrape_openmetrics(server.client)
    assert text.names == strict.names - {"# EOF"}
    for name in ("arrowquant_jobs_finished_total", "arrowquant_stage_seconds_total", "process_resident_memory_bytes"):
        assert name in text.names
    assert text.value("arrowquant_event_loop_late_seconds_count") > 0
    assert all(family.documentation for family in strict.families.values())
    assert finished["status"] == "succeeded"


def test_a_job_moves_the_numbers_by_what_it_did(start_server: StartServer, model: Path) -> None:
    server = start_server()
    before = scrape(server.client)
    job = server.run(body(model, "parquet"))
    after = scrape_until(server, "arrowquant_jobs", 1, status="succeeded")
    for name, labels in (
        ("arrowquant_jobs_created_total", {"kind": "quantize"}),
        ("arrowquant_jobs_finished_total", {"kind": "quantize", "status": "succeeded"}),
        ("arrowquant_job_seconds_count", {"kind": "quantize"}),
        ("arrowquant_job_queue_seconds_count", {}),
    ):
        assert (before.value(name, **labels), after.value(name, **labels)) == (0, 1), name
    for stage in ("plan", "read", "quantize", "write", "hash", "publish"):
        counted = after.value("arrowquant_stage_seconds_total", stage=stage, backend="cpu")
        assert counted == pytest.approx(job["times"][f"{stage}_s"], abs=1e-5), stage
    moved = {s: after.value("arrowquant_stage_bytes_total", stage=s, backend="cpu") for s in ("read", "quantize")}
    assert moved == {"read": MODEL_BYTES, "quantize": MODEL_BYTES}
    stored = sum(file["size_bytes"] for file in server.artifacts(job["id"]))
    assert after.value("arrowquant_stored_bytes", kind="artifacts") == stored
    assert after.value("arrowquant_stage_bytes_total", stage="hash", backend="cpu") == stored
    assert after.value("arrowquant_disk_free_bytes") > 0
    assert after.value("arrowquant_build_info", version=server.client.get("/healthz").json()["version"]) == 1
    again = server.run(validation(model, {"type": "job", "job_id": job["id"]}))
    later = scrape_until(server, "arrowquant_jobs", 2, status="succeeded")
    assert again["times"]["compare_s"] > 0
    assert later.value("arrowquant_stage_bytes_total", stage="compare", backend="cpu") == MODEL_BYTES
    assert server.client.delete(f"/v1/jobs/{job['id']}?purge=true").status_code == 204
    assert scrape_until(server, "arrowquant_stored_bytes", 0, kind="artifacts").value("arrowquant_blobs") == 0


def scrape_until(server: Server, name: str, value: float, **labels: str) -> Scrape:
    """Figures are held for a while; the first scrape that has this one."""
    while (found := scrape(server.client)).value(name, **labels) != value:
        pass
    return found


def test_the_parts_of_a_jobs_time_add_up_to_how_long_it_ran(server: Server, finished: Json) -> None:
    ran = datetime.fromisoformat(finished["finished_at"]) - datetime.fromisoformat(finished["started_at"])
    assert 0.5 * ran.total_seconds() < seconds(finished) <= ran.total_seconds() + 1e-3
    assert finished["times"]["queue_s"] >= 0
    assert finished["times"].keys() == {
        f"{p}_s" for p in ("queue", "plan", "read", "quantize", "write", "hash", "publish")
    }
    stages = server.report(finished["id"])["stages"]
    assert stages["hash"] == pytest.approx(finished["times"]["hash_s"], abs=1e-5)


def test_times_grow_while_a_job_runs_and_a_waiting_job_has_none(start_server: StartServer, model_root: Path) -> None:
    server = start_server(max_running_jobs=1)
    long = save_model(model_root / "long", layers=1000)
    running = server.submit(body(long, "parquet", method="mse", backend="reference"))
    waiting = server.submit(body(long, "parquet"))
    assert "times" not in waiting
    shown: list[float] = []
    with server.stream(running["id"]) as events:
        for event in events:
            if event["type"] == "job.progress":
                shown.append(seconds(server.job(running["id"])))
            if len(shown) == 3:
                break
    assert shown == sorted(shown)
    assert shown[0] < shown[-1]
    live = scrape(server.client)
    assert live.value("arrowquant_stage_seconds_total", stage="quantize", backend="reference") > 0
    assert live.value("arrowquant_jobs", status="queued") == live.value("arrowquant_job_queue_depth") == 1
    for job in (waiting, running):
        server.cancel(job["id"])
    assert server.finish(waiting["id"])["times"].keys() == {"queue_s"}
    cancelled = server.finish(running["id"])
    assert seconds(cancelled) >= shown[-1]
    done = scrape_until(server, "arrowquant_jobs", 2, status="cancelled")
    assert done.value("arrowquant_cancel_seconds_count") == 2
    assert done.value("arrowquant_cancel_seconds_sum") > 0
    assert done.value("arrowquant_jobs_finished_total", kind="quantize", status="cancelled") == 2


def test_lag_is_that_of_live_events_alone(start_server: StartServer, model: Path) -> None:
    server = start_server(max_running_jobs=1)
    blocking = server.submit(body(model, "parquet", backend="reference", method="mse"))
    job = server.submit(body(model, "parquet"))
    with server.stream(job["id"]) as events:
        first = next(events)
        assert first["type"] == "job.queued"
        seen = list(events)
    server.finish(blocking["id"])
    server.follow(job["id"])
    lag = scrape(server.client)
    assert 1 <= lag.value("arrowquant_event_lag_seconds_count") <= len(seen)
    assert lag.value("arrowquant_event_readers_cut_total") == 0


def test_an_open_stream_is_counted_and_timed_by_nothing(start_server: StartServer, model_root: Path) -> None:
    server = start_server()
    job = server.submit(body(large_model(model_root), "parquet", method="mse", backend="reference"))
    with server.stream(job["id"]) as events:
        next(events)
        scrape_until(server, "arrowquant_event_streams", 1)
        assert scrape(server.client).value("arrowquant_http_requests_in_flight") == 2, "the stream and the scrape"
    server.cancel(job["id"])
    server.finish(job["id"])
    small = server.run(body(save_model(model_root / "counted"), "parquet"))
    server.client.get(f"/v1/jobs/{small['id']}/archive")
    server.client.get(f"/v1/jobs/{small['id']}/artifacts")
    path = server.artifacts(small["id"])[0]["path"]
    server.client.get(f"/v1/jobs/{small['id']}/artifacts/{path}")
    server.client.put(f"/v1/blobs/sha256:{'0' * 64}", content=b"not these")
    found = scrape(server.client)
    counted = {labels["route"] for labels in found.labels("arrowquant_http_requests_total")}
    timed = {labels["route"] for labels in found.labels("arrowquant_http_request_seconds_count")}
    assert counted - timed >= {
        "/v1/jobs/{job_id}/events",
        "/v1/jobs/{job_id}/archive",
        "/v1/jobs/{job_id}/artifacts/{path:path}",
        "/v1/blobs/sha256:{digest}",
    }
    assert {"/v1/jobs", "/v1/jobs/{job_id}/artifacts"} <= timed
    waited = found.value("arrowquant_http_request_seconds_count", method="GET", route="/v1/jobs/{job_id}", status="200")
    asked = found.value("arrowquant_http_requests_total", method="GET", route="/v1/jobs/{job_id}", status="200")
    assert waited < asked, "calls that asked to wait are not timed"


def test_clients_cannot_multiply_labels(start_server: StartServer) -> None:
    server = start_server()
    for number in range(20):
        server.client.get(f"/v1/jobs/job_{number}")
        server.client.get(f"/nothing/{number}")
        server.client.request(f"METHOD{number}", f"/v1/batches/{number}")
        server.client.head(f"/v1/jobs/job_{number}")
    found = scrape(server.client)
    labels = found.labels("arrowquant_http_requests_total")
    assert len(labels) < 10
    assert {one["method"] for one in labels} == {"GET", "HEAD", "other"}
    routes = {one["route"] for one in labels}
    assert routes == {"/readyz", "(none)", "/v1/jobs/{job_id}", "/v1/batches/{batch_id}"}
    total = found.value("arrowquant_http_requests_total", method="GET", route="(none)", status="404")
    assert total == 20
    assert found.value("arrowquant_http_problems_total", code="not_found") == 60


def test_refusals_are_counted_by_their_codes(keyed: Keyed) -> None:
    admin = keyed.client("operators", Scope.ADMIN)
    often = keyed.client("often", Scope.READ, requests_per_minute=1)
    before = scrape(admin)
    keyed.anonymous.get("/v1/jobs")
    assert [often.get("/v1/jobs").status_code for _ in range(2)] == [200, 429]
    assert keyed.client("readers", Scope.READ).get("/metrics").status_code == 403
    after = scrape(admin)
    for code in ("unauthorized", "rate_limited", "forbidden_scope"):
        name = "arrowquant_http_problems_total"
        assert after.value(name, code=code) == before.value(name, code=code) + 1
    refused = {"method": "GET", "route": "/v1/jobs", "status": "401"}
    assert after.value("arrowquant_http_requests_total", **refused) >= 1


def test_tenants_are_shown_where_there_are_keys_and_to_admins_alone(keyed: Keyed, server: Server, model: Path) -> None:
    keyed.client("shown").run(body(model, "parquet"))
    found = scrape(keyed.client("operators", Scope.ADMIN))
    while not found.value("arrowquant_tenant_stored_bytes", tenant="shown"):
        found = scrape(keyed.client("operators", Scope.ADMIN))
    assert not [name for name in scrape(server.client).names if "tenant" in name]


def test_only_so_many_tenants_are_shown_by_name() -> None:
    tenants = {f"t{number:03}": 1000 - number for number in range(TENANTS_SHOWN + 50)}
    stored = Stored({}, tenants, 0, 0, 0)
    collector = FiguresCollector(by_tenant=True)
    collector.figures = Figures({}, 0, 0, 0, {}, {}, stored, None)
    family = next(f for f in collector.collect() if f.name == "arrowquant_tenant_stored_bytes")
    shown = {sample.labels["tenant"]: sample.value for sample in family.samples}
    assert len(shown) == TENANTS_SHOWN + 1
    assert sum(shown.values()) == sum(tenants.values())
    assert OTHERS in shown
    assert "t000" in shown
    assert "t149" not in shown
