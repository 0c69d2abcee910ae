"""What a tenant may use: calls in a minute, open jobs, stored bytes; and how it is told."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from service.api.rate_limits import Bucket, Quota
from service.jobs.quotas import NO_LIMITS, Limits
from tests.api.keyed import Keyed
from tests.api.test_jobs import large_model
from tests.conftest import StartServer
from tests.server import Server, body

SLOW = {"method": "mse", "backend": "reference"}


def refused(response: httpx.Response, code: str) -> int:
    """The seconds to wait, after a look at the rest of the answer."""
    assert (response.status_code, response.json()["code"]) == (429, code), response.text
    return int(response.headers["retry-after"])


# --- calls ---


def test_a_bucket_empties_call_by_call_and_fills_in_a_minute() -> None:
    quota = Quota("tenant", "a", 60)
    bucket = Bucket(quota, now=0.0)
    for _ in range(60):
        assert bucket.next_s == 0
        bucket.take()
    assert (bucket.remaining, bucket.next_s, bucket.full_s) == (0, 1.0, 60.0)
    bucket.fill(quota, now=0.5)
    assert (bucket.remaining, bucket.next_s) == (0, 0.5)
    bucket.fill(quota, now=2.0)
    assert (bucket.remaining, bucket.next_s) == (2, 0.0)
    bucket.fill(quota, now=1000.0)
    assert bucket.remaining == 60, "never more than full"


def test_a_changed_limit_holds_for_a_bucket_in_use() -> None:
    bucket = Bucket(Quota("tenant", "a", 600), now=0.0)
    bucket.fill(Quota("tenant", "a", 6), now=0.0)
    assert bucket.remaining == 6


def test_calls_are_counted_down_and_refused_when_there_are_too_many(keyed: Keyed) -> None:
    client, other = keyed.client("hasty", requests_per_minute=3), keyed.client("hasty")
    for left in (2, 1, 0):
        response = client.get("/v1/jobs")
        assert response.status_code == 200
        assert response.headers["ratelimit-policy"] == '"tenant";q=6000;w=60, "key";q=3;w=60'
        assert re.fullmatch(rf'"tenant";r=\d+;t=\d+, "key";r={left};t=\d+', response.headers["ratelimit"])
        assert "retry-after" not in response.headers
    response = client.get("/v1/jobs")
    assert 1 <= refused(response, "rate_limited") <= 20
    assert '"key";r=0' in response.headers["ratelimit"]
    assert other.get("/v1/jobs").status_code == 200, "the key's own limit, not its tenant's"


def test_the_keys_of_a_tenant_share_its_limit_and_no_other_tenants(keyed: Keyed) -> None:
    keyed.keys.set_limits("sharing", Limits(requests_per_minute=2))
    first, second, other = keyed.client("sharing"), keyed.client("sharing"), keyed.client("not-sharing")
    assert first.get("/v1/jobs").status_code == 200
    assert second.get("/v1/jobs").headers["ratelimit-policy"] == '"tenant";q=2;w=60'
    assert refused(first.get("/v1/jobs"), "rate_limited") <= 30
    refused(second.post("/v1/jobs", json={}), "rate_limited")
    assert other.get("/v1/jobs").status_code == 200


def test_errors_and_refused_scopes_are_calls_as_well(keyed: Keyed) -> None:
    client = keyed.client("erring", requests_per_minute=10)
    rates = [client.get("/v1/jobs/job_0"), client.get("/metrics"), client.get("/nothing")]
    assert [r.status_code for r in rates] == [404, 403, 404]
    left = [int(re.search(r'"key";r=(\d+)', r.headers["ratelimit"])[1]) for r in rates]  # type: ignore[index]
    assert left == [9, 8, 7]


def test_health_is_never_refused(keyed: Keyed) -> None:
    client = keyed.client("healthy", requests_per_minute=1)
    assert all(client.get("/healthz").status_code == 200 for _ in range(5))


def test_where_no_keys_are_asked_for_calls_are_not_counted(start_server: StartServer) -> None:
    server = start_server(requests_per_minute=1)
    answers = [server.client.get("/v1/jobs") for _ in range(5)]
    assert {a.status_code for a in answers} == {200}
    assert not any("ratelimit" in a.headers for a in answers)


# --- jobs ---


def test_a_tenant_may_have_so_many_open_jobs_and_others_theirs(keyed: Keyed, model: Path, model_root: Path) -> None:
    keyed.keys.set_limits("open", Limits(max_open_jobs=2))
    client, other = keyed.client("open"), keyed.client("open-too")
    slow = body(large_model(model_root), "parquet", **SLOW)
    first = client.submit(slow)
    two = {"items": [body(model, "parquet"), body(model, "parquet")]}
    assert refused(client.post("/v1/batches", json=two), "too_many_open_jobs") > 0
    second = client.submit(slow)
    response = client.post("/v1/jobs", json=slow)
    assert refused(response, "too_many_open_jobs") > 0
    assert "2 of your jobs" in response.json()["detail"]
    assert other.submit(body(model, "parquet"))["id"]
    for job in (first, second):
        client.delete(f"/v1/jobs/{job['id']}")
        client.get(f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=30"})
    assert client.run(body(model, "parquet"))["status"] == "succeeded"


def test_a_tenant_that_fills_the_queue_leaves_room_for_the_first_job_of_others(
    tmp_path: Path, model: Path, model_root: Path
) -> None:
    options = {"require_keys": True, "max_running_jobs": 1, "max_queued_jobs": 5}
    keyed = Keyed(Server(tmp_path / "data", [model_root], **options))
    try:
        many, one, late = keyed.client("many"), keyed.client("one"), keyed.client("late")
        slow = body(large_model(model_root), "parquet", **SLOW)
        jobs = [many.submit(slow) for _ in range(5)]
        assert many.get(f"/v1/jobs/{jobs[0]['id']}").json()["status"] == "running"
        response = many.post("/v1/jobs", json=slow)
        assert refused(response, "queue_full") > 0
        assert "4 may" in response.json()["detail"]
        both = {"items": [slow, slow]}
        assert refused(one.post("/v1/batches", json=both), "queue_full") > 0, "one place is kept for it, not two"
        other = one.submit(slow)
        assert refused(one.post("/v1/jobs", json=slow), "queue_full") > 0
        assert refused(late.post("/v1/jobs", json=slow), "queue_full") > 0
        one.delete(f"/v1/jobs/{other['id']}")
        last = late.submit(body(model, "parquet"))
        for job in jobs:
            many.delete(f"/v1/jobs/{job['id']}")
        assert late.get(f"/v1/jobs/{last['id']}", headers={"Prefer": "wait=60"}).json()["status"] == "succeeded"
    finally:
        keyed.stop()


def test_a_tenant_may_store_so_many_bytes_until_it_purges(keyed: Keyed, model: Path) -> None:
    client = keyed.client("storing")
    job = client.run(body(model, "parquet"))
    keyed.keys.set_limits("storing", Limits(max_stored_bytes=1))
    response = client.post("/v1/jobs", json=body(model, "parquet"))
    assert refused(response, "storage_quota_exceeded") > 0
    assert keyed.client("storing-too").submit(body(model, "parquet"))["id"]
    assert client.delete(job["links"]["self"], params={"purge": "true"}).status_code == 204
    again = client.submit(body(model, "parquet"))
    assert again["status"] in ("queued", "running", "succeeded")
    keyed.keys.set_limits("storing", NO_LIMITS)


@pytest.mark.parametrize("refuse", ["max_open_jobs", "max_stored_bytes"])
def test_the_settings_hold_for_tenants_without_limits_of_their_own(
    start_server: StartServer, model: Path, model_root: Path, refuse: str
) -> None:
    server = start_server(**{refuse: 1})
    if refuse == "max_stored_bytes":
        server.run(body(model, "parquet"))
    else:
        server.submit(body(large_model(model_root), "parquet", **SLOW))
    code = "too_many_open_jobs" if refuse == "max_open_jobs" else "storage_quota_exceeded"
    assert refused(server.client.post("/v1/jobs", json=body(model, "parquet")), code) > 0
