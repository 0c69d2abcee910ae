"""Retention over HTTP: what a client sees of what is kept no longer, and how an operator has it removed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.jobs.api_keys import Scope
from tests.api.keyed import Keyed
from tests.api.test_jobs import large_model
from tests.conftest import StartServer
from tests.server import Json, Server, body, validation, wait_until

NOTHING = {what: {"count": 0, "size_bytes": 0} for what in ("jobs", "artifacts", "events", "blobs", "uploads")}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, model_root: Path) -> Iterator[Server]:
    """A server of this module, where everything is kept until a test says otherwise."""
    running = Server(tmp_path_factory.mktemp("retention") / "data", [model_root]).start()
    yield running
    running.stop()
    assert "Traceback" not in running.log, running.log_end


def collect(server: Server, **asked: Any) -> Json:
    response = server.client.post("/v1/gc", json=asked)
    assert response.status_code == 200, response.text
    found: Json = response.json()
    return found


def removed(found: Json) -> dict[str, int]:
    return {what: tally["count"] for what, tally in found["removed"].items() if tally["count"]}


def arrowquant(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("ARROWQUANT_")} | environment
    command = [sys.executable, "-m", "service", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


# --- what a client sees ---


def test_a_job_whose_files_have_expired_is_there_with_its_report_and_says_so(own: Server, model: Path) -> None:
    job = own.run(body(model, "parquet"))
    links, path = job["links"], own.artifacts(job["id"])[0]["path"]
    report = own.report(job["id"])
    assert removed(collect(own, artifact_ttl_s=0)) == {"artifacts": 1}
    for address in (links["artifacts"], f"{links['artifacts']}/{path}", links["archive"]):
        response = own.client.get(address)
        assert (response.status_code, response.json()["code"]) == (410, "artifacts_expired"), address
    found = own.job(job["id"])
    assert found.pop("artifacts_expired_at") > job["finished_at"]
    assert found == job
    assert own.report(job["id"]) == report
    assert own.client.get(f"{links['artifacts']}/parquet/nothing").status_code == 404
    for call, asked in (("/v1/jobs", {}), ("/v1/plans", {})):
        response = own.client.post(call, json=body({"type": "job", "job_id": job["id"]}, "parquet") | asked)
        assert (response.status_code, response.json()["code"]) == (410, "artifacts_expired")
        assert response.json()["errors"][0]["pointer"] == "/source/job_id"
    assert own.client.get("/problems/artifacts_expired").status_code == 200


def test_outputs_with_an_address_of_their_own_stay_and_are_still_served(
    own: Server, model: Path, model_root: Path
) -> None:
    target = {"format": "parquet", "uri": (model_root / "theirs").as_uri()}
    job = own.run(body(model, "compressed-tensors", target))
    collect(own, artifact_ttl_s=0)
    files = own.files(job["id"])
    assert files
    assert {path.split("/")[0] for path in files} == {"parquet"}
    weights = f"{job['links']['artifacts']}/compressed-tensors/model.safetensors"
    for address in (weights, job["links"]["archive"]):
        assert own.client.get(address).status_code == 410
    own.run(validation(model, {"type": "job", "job_id": job["id"], "output": "parquet"}))


def test_of_an_expired_log_the_last_event_is_left(own: Server, model: Path) -> None:
    batch = own.client.post("/v1/batches", json={"items": [body(model, "parquet")]}).json()
    job = own.finish(batch["job_ids"][0])
    whole = own.follow(job["id"])
    assert removed(collect(own, event_ttl_s=0))["events"] >= 1
    (last,) = own.follow(job["id"])
    assert last.pop("job").pop("events_expired_at") > job["finished_at"]
    assert last == {name: value for name, value in whole[-1].items() if name != "job"}
    assert own.follow(job["id"], last_event_id=1)[0]["type"] == "job.succeeded"
    address = job["links"]["events"]
    assert own.client.get(address, headers={"Last-Event-ID": str(last["id"])}).status_code == 204
    assert len(own.client.get(address, headers={"Accept": "application/json"}).json()["data"]) == 1
    merged = own.client.get(f"{batch['links']['self']}/events", headers={"Accept": "application/json"}).json()["data"]
    assert [(event["type"], event["index"]) for event in merged] == [("job.succeeded", 0)]


def test_settings_have_a_server_forget_by_itself(start_server: StartServer, model: Path) -> None:
    server = start_server(artifact_ttl_s=0.2, event_ttl_s=0.2, job_ttl_s=2)
    job = server.run(body(model, "parquet"))
    wait_until(lambda: server.client.get(job["links"]["archive"]).status_code == 410)
    assert server.client.get(job["links"]["report"]).status_code == 200
    wait_until(lambda: server.client.get(job["links"]["self"]).status_code == 404)
    wait_until(lambda: not server.leftovers(job["id"]))
    for told in ("1 artifacts", "1 jobs"):
        wait_until(lambda told=told: f"kept no longer: {told}" in server.log)
    assert server.client.get("/v1/jobs").json()["data"] == []


# --- in use ---


def test_what_is_being_downloaded_stays_until_it_has_arrived(own: Server, model_root: Path) -> None:
    server = own
    collect(server, job_ttl_s=0)
    job = server.run(body(large_model(model_root), "parquet", "compressed-tensors", bit_width=8, method="minmax"))
    whole, files = server.client.get(job["links"]["archive"]).content, server.files(job["id"])
    weights = max(files, key=lambda path: len(files[path]))
    addresses = {job["links"]["archive"]: whole, f"{job['links']['artifacts']}/{weights}": files[weights]}
    begun, go_on = threading.Barrier(len(addresses) + 1), threading.Event()
    arrived: dict[str, bytes] = {}

    def download(address: str) -> None:
        with httpx.stream("GET", f"{server.base_url}{address}", timeout=90) as response:
            pieces = response.iter_raw(1 << 16)
            came = next(pieces)
            begun.wait()
            go_on.wait()
            arrived[address] = came + b"".join(pieces)

    threads = [threading.Thread(target=download, args=(address,)) for address in addresses]
    for thread in threads:
        thread.start()
    begun.wait()
    assert removed(collect(server, artifact_ttl_s=0, job_ttl_s=0)) == {}
    go_on.set()
    for thread in threads:
        thread.join()
    assert arrived == addresses
    # The last lease is given back just after the last byte.
    wait_until(lambda: removed(collect(server, artifact_ttl_s=0)) == {"artifacts": 1})


def test_a_download_that_hangs_up_holds_nothing(own: Server, model_root: Path) -> None:
    server = own
    collect(server, job_ttl_s=0)
    job = server.run(body(large_model(model_root), "parquet", bit_width=8, method="minmax"))
    for _ in range(3):
        with httpx.stream("GET", f"{server.base_url}{job['links']['archive']}", timeout=90) as response:
            next(response.iter_raw(1 << 16))
    wait_until(lambda: removed(collect(server, job_ttl_s=0)) == {"jobs": 1})
    assert not server.leftovers(job["id"])


# --- an operator ---


def test_the_call_takes_the_scope_admin(keyed: Keyed) -> None:
    for scopes, status in (((Scope.READ, Scope.SUBMIT), 403), ((Scope.ADMIN,), 200)):
        response = keyed.client("operators", *scopes).post("/v1/gc", json={"dry_run": True})
        assert response.status_code == status, response.text


@pytest.mark.parametrize(
    "asked",
    [
        {"artifact_ttl_s": -1},
        {"artifact_ttl_s": "1"},
        {"max_total_bytes": 1.5},
        {"max_total_bytes": False},
        {"ttl": 1},
        {"dry_run": "maybe"},
        {"dry_run": 0},
    ],
)
def test_what_cannot_be_asked_for_is_422_and_removes_nothing(own: Server, asked: Json) -> None:
    response = own.client.post("/v1/gc", json=asked | {"job_ttl_s": 0} if "ttl" not in asked else asked)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


def test_a_dry_run_shows_what_then_goes(own: Server, model: Path) -> None:
    collect(own, artifact_ttl_s=0)
    jobs = [own.run(body(model, "parquet")) for _ in range(2)]
    size = sum(len(content) for content in own.files(jobs[0]["id"]).values())
    shown = collect(own, dry_run=True, artifact_ttl_s=0)
    assert [item["id"] for item in shown["items"]] == [job["id"] for job in jobs]
    assert {(item["what"], item["why"], item["size_bytes"]) for item in shown["items"]} == {("artifacts", "age", size)}
    assert own.files(jobs[0]["id"])
    assert collect(own, artifact_ttl_s=0) == shown | {"dry_run": False}
    assert collect(own, artifact_ttl_s=0)["removed"] == NOTHING


def test_the_command_asks_the_server_of_the_folder_and_does_it_alone_when_none_runs(
    start_server: StartServer,
) -> None:
    server = start_server()
    digest = hashlib.sha256(b"blob").hexdigest()
    assert server.client.put(f"/v1/blobs/sha256:{digest}", content=b"blob").status_code == 201
    gc = ("gc", "--data-dir", server.data_dir, "--blob-ttl-s", "0")
    assert arrowquant("gc", "--server", server.base_url).stdout == "removed: nothing\n"
    shown = arrowquant(*gc, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert digest in shown.stdout
    assert shown.stdout.splitlines()[-1] == "would go: 1 blobs, 0.0 MiB"
    assert server.client.head(f"/v1/blobs/sha256:{digest}").status_code == 200
    server.stop()
    done = arrowquant(*gc, "--json")
    assert removed(json.loads(done.stdout)) == {"blobs": 1}, done.stderr
    assert list((server.data_dir / "blobs" / "sha256").glob("*/*")) == []


def test_the_command_goes_by_the_settings_and_refuses_what_is_no_data_folder(
    start_server: StartServer, model: Path, tmp_path: Path
) -> None:
    server = start_server()
    job = server.run(body(model, "parquet"))
    server.stop()
    alone = arrowquant("gc", "--data-dir", server.data_dir, ARROWQUANT_JOB_TTL_S="0.001")
    assert alone.stdout.splitlines()[0].startswith(f"jobs       {job['id']}"), alone.stderr
    assert server.leftovers(job["id"]) == []
    refused = arrowquant("gc", "--data-dir", tmp_path / "nothing")
    assert (refused.returncode, "is no data folder" in refused.stderr) == (2, True)
    assert not (tmp_path / "nothing").exists()
    both = arrowquant("gc", "--data-dir", server.data_dir, "--server", "http://127.0.0.1:1")
    assert both.returncode == 2


def test_the_quota_goes_down_with_what_expires(keyed: Keyed, model: Path) -> None:
    client, admin = keyed.client("small"), keyed.client("operators", Scope.ADMIN)
    keyed.keys.set_limits("small", keyed.keys.limits("small").__class__(max_stored_bytes=1))
    job = client.run(body(model, "parquet"))
    assert client.post("/v1/jobs", json=body(model, "parquet")).json()["code"] == "storage_quota_exceeded"
    assert admin.post("/v1/gc", json={"artifact_ttl_s": 0}).status_code == 200
    assert client.get(job["links"]["archive"]).status_code == 410
    assert client.run(body(model, "parquet"))["status"] == "succeeded"
