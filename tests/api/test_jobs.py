"""Jobs over HTTP: created, listed, waited for, cancelled, purged."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import save_model
from tests.api.test_problems import problem_of
from tests.conftest import StartServer
from tests.server import Server, body

#: Of `large_model`.
LARGE_TENSORS = 16


def large_model(root: Path) -> Path:
    """Large enough that a job on it is still running when the next call comes."""
    folder = root / "large"
    return folder if folder.exists() else save_model(folder, layers=LARGE_TENSORS, rows=2048, cols=2048)


def test_creating_answers_202_with_the_address_and_the_job(server: Server, model: Path) -> None:
    response = server.client.post("/v1/jobs", json=body(model, "parquet", bit_width=3) | {"labels": {"a": "b"}})
    job = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == job["links"]["self"] == f"/v1/jobs/{job['id']}"
    assert job["id"].startswith("job_")
    assert job["kind"] == "quantize"
    assert job["labels"] == {"a": "b"}
    assert job["config"]["bit_width"] == 3
    assert job["config"]["profile"] == "local"
    assert "preference-applied" not in response.headers
    server.finish(job["id"])


def test_waiting_answers_as_soon_as_the_job_has_ended(server: Server, model: Path) -> None:
    response = server.client.post("/v1/jobs", json=body(model, "parquet"), headers={"Prefer": "respond-async, wait=60"})
    assert response.status_code == 202
    assert response.headers["preference-applied"] == "wait=60"
    assert response.json()["status"] == "succeeded"


def test_waiting_ends_after_the_time_asked_for(server: Server, model_root: Path) -> None:
    job = server.submit(body(large_model(model_root), "parquet"))
    response = server.client.get(f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=0"})
    assert response.json()["status"] in ("queued", "running")
    server.cancel(job["id"])
    server.finish(job["id"])


def test_a_wait_of_more_than_a_minute_is_one_of_a_minute(server: Server, finished: dict[str, Any]) -> None:
    response = server.client.get(finished["links"]["self"], headers={"Prefer": "wait=3600"})
    assert response.headers["preference-applied"] == "wait=60"


def test_a_job_shows_what_is_there_and_leaves_out_the_rest(server: Server, finished: dict[str, Any]) -> None:
    job = server.job(finished["id"])
    assert job["status"] == "succeeded"
    assert "error" not in job
    assert None not in job.values()
    assert job["result"]["cosine_similarity"] > 0.9
    assert [o["name"] for o in job["result"]["outputs"]] == ["compressed-tensors", "parquet"]
    for name in ("created_at", "started_at", "finished_at"):
        assert datetime.fromisoformat(job[name]).utcoffset() is not None


def test_a_failed_job_carries_a_problem(server: Server, model_root: Path) -> None:
    broken = save_model(model_root / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-1000])
    job = server.finish(server.submit(body(broken, "parquet"))["id"])
    error = job["error"]
    assert job["status"] == "failed"
    assert error["type"] == f"/problems/{error['code']}"
    assert error["code"] == "corrupt_model"
    assert error["status"] == 422
    assert error["instance"] == f"/v1/jobs/{job['id']}"
    assert server.client.get(f"/v1/jobs/{job['id']}/report").json()["code"] == "job_not_finished"
    assert server.client.get(f"/v1/jobs/{job['id']}/archive").json()["code"] == "job_not_finished"
    assert server.artifacts(job["id"]) == []


def test_an_unknown_job_is_404_everywhere(server: Server) -> None:
    for end in ("", "/events", "/report", "/artifacts", "/artifacts/a/b", "/archive"):
        response = server.client.get(f"/v1/jobs/job_none{end}")
        assert response.status_code == 404, end
        assert response.json()["code"] == "not_found"
    assert server.client.delete("/v1/jobs/job_none").status_code == 404
    assert server.client.delete("/v1/jobs/job_none", params={"purge": "true"}).status_code == 404


def test_a_job_that_is_known_already_is_not_sent_again(server: Server, finished: dict[str, Any]) -> None:
    address = finished["links"]["self"]
    etag = server.client.get(address).headers["etag"]
    again = server.client.get(address, headers={"If-None-Match": f'"other", W/{etag}'})
    assert again.status_code == 304
    assert again.content == b""
    assert again.headers["etag"] == etag
    assert server.client.get(address, headers={"If-None-Match": '"other"'}).status_code == 200


def test_head_answers_as_get_without_the_body(server: Server, finished: dict[str, Any]) -> None:
    for end in ("", "/report", "/artifacts", "/archive", "/events"):
        address = f"/v1/jobs/{finished['id']}{end}"
        head = server.client.head(address)
        assert head.status_code == 200, end
        assert head.content == b""
        if end != "/events":
            assert head.headers["content-length"] == str(len(server.client.get(address).content))


def test_pages_hold_every_job_once_newest_first(start_server: StartServer, model: Path) -> None:
    server = start_server()
    ids = [server.submit(body(model, "parquet"))["id"] for _ in range(5)]
    seen: list[str] = []
    parameters: dict[str, Any] = {"limit": 2}
    while True:
        page = server.client.get("/v1/jobs", params=parameters).json()
        seen += [job["id"] for job in page["data"]]
        if "next_cursor" not in page:
            break
        parameters["after"] = page["next_cursor"]
    assert seen == ids[::-1]
    assert seen == sorted(seen, reverse=True)
    for job_id in ids:
        server.finish(job_id)


def test_lists_are_filtered(start_server: StartServer, model: Path) -> None:
    server = start_server()
    first = server.run(body(model, "parquet") | {"labels": {"team": "a:b"}})
    second = server.run(body(model, "parquet") | {"labels": {"team": "c"}})

    def ids(**parameters: str) -> list[str]:
        response = server.client.get("/v1/jobs", params=parameters)
        assert response.status_code == 200, response.text
        return [job["id"] for job in response.json()["data"]]

    assert ids(label="team:a:b") == [first["id"]]
    assert ids(status="succeeded") == [second["id"], first["id"]]
    assert ids(status="running") == []
    assert ids(kind="validate") == []
    assert ids(created_after=first["created_at"]) == [second["id"]]
    assert ids(created_after="0001-01-01T00:00:00+14:00") == [second["id"], first["id"]]
    assert ids(created_after="9999-12-31T23:59:59-14:00") == []
    for wrong in (
        {"label": "team"},
        {"status": "asleep"},
        {"created_after": "2026-01-01T00:00:00"},
        {"after": "garbage"},
        {"after": ""},
        {"stauts": "running"},
    ):
        problem = problem_of(server.client.get("/v1/jobs", params=wrong), 422, "invalid_request")
        assert [e["parameter"] for e in problem["errors"]] == list(wrong)


@pytest.mark.parametrize(
    "end", ["/jobs", "/jobs/{}", "/jobs/{}/events", "/jobs/{}/report", "/jobs/{}/artifacts", "/jobs/{}/archive"]
)
def test_a_parameter_that_a_call_does_not_have_is_refused(server: Server, finished: dict[str, Any], end: str) -> None:
    response = server.client.get(f"/v1{end.format(finished['id'])}", params={"limt": "5"})
    assert problem_of(response, 422, "invalid_request")["errors"][0]["parameter"] == "limt"


def test_a_misspelt_purge_cancels_nothing(server: Server, model_root: Path) -> None:
    job = server.submit(body(large_model(model_root), "parquet"))
    response = server.client.delete(f"/v1/jobs/{job['id']}", params={"pruge": "true"})
    assert "it takes purge" in problem_of(response, 422, "invalid_request")["detail"]
    assert server.job(job["id"])["status"] in ("queued", "running")
    server.cancel(job["id"])
    server.finish(job["id"])


def test_a_label_that_no_filter_could_name_is_refused(server: Server, model: Path) -> None:
    response = server.client.post("/v1/jobs", json=body(model, "parquet") | {"labels": {"team:a": "b"}})
    problem = problem_of(response, 422, "invalid_request")
    assert [e["pointer"] for e in problem["errors"]] == ["/labels/team:a"]
    assert "colon" in problem["detail"]


def test_cancelling_a_running_job_answers_202_and_again_200(server: Server, model_root: Path) -> None:
    job = server.submit(body(large_model(model_root), "parquet"))
    server.wait_for(job["id"], "job.started")
    response = server.cancel(job["id"])
    assert response.status_code == 202
    assert response.json()["status"] in ("cancelling", "cancelled")
    assert server.finish(job["id"])["status"] == "cancelled"
    again = server.cancel(job["id"])
    assert again.status_code == 200
    assert again.json()["status"] == "cancelled"


def test_cancelling_a_queued_job_ends_it_at_once(start_server: StartServer, model: Path, model_root: Path) -> None:
    server = start_server(max_running_jobs=1)
    blocker = server.submit(body(large_model(model_root), "parquet"))
    queued = server.submit(body(model, "parquet"))
    response = server.cancel(queued["id"])
    assert (response.status_code, response.json()["status"]) == (202, "cancelled")
    server.cancel(blocker["id"])
    server.finish(blocker["id"])


def test_cancelling_what_has_ended_changes_nothing(server: Server, finished: dict[str, Any]) -> None:
    response = server.cancel(finished["id"])
    assert (response.status_code, response.json()) == (200, server.job(finished["id"]))


def test_purging_deletes_all_there_is_of_an_ended_job(server: Server, model: Path, model_root: Path) -> None:
    job = server.run(body(model, "parquet"))
    response = server.client.delete(f"/v1/jobs/{job['id']}", params={"purge": "true"})
    assert (response.status_code, response.content) == (204, b"")
    assert server.client.get(f"/v1/jobs/{job['id']}").status_code == 404
    assert server.leftovers(job["id"]) == []

    running = server.submit(body(large_model(model_root), "parquet"))
    response = server.client.delete(f"/v1/jobs/{running['id']}", params={"purge": "true"})
    assert (response.status_code, response.json()["code"]) == (409, "job_not_terminal")
    server.cancel(running["id"])
    server.finish(running["id"])


def test_a_full_queue_answers_429_and_when_to_come_back(start_server: StartServer, model_root: Path) -> None:
    server = start_server(max_running_jobs=1, max_queued_jobs=1)
    asked = body(large_model(model_root), "parquet")
    jobs = [server.submit(asked)]
    server.wait_for(jobs[0]["id"], "job.started")
    jobs.append(server.submit(asked))
    response = server.client.post("/v1/jobs", json=asked)
    assert (response.status_code, response.json()["code"]) == (429, "queue_full")
    assert int(response.headers["retry-after"]) > 0
    ready = server.client.get("/readyz")
    assert (ready.status_code, ready.json()["code"]) == (503, "not_ready")
    for job in reversed(jobs):
        server.cancel(job["id"])
    for job in jobs:
        server.finish(job["id"])
    assert server.client.get("/readyz").status_code == 200
