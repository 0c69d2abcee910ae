"""Tenants: none sees, uses, changes or hears of what is another's, on any route."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.jobs.api_keys import ApiKeys, Scope
from tests.api.keyed import Client, Keyed
from tests.api.test_auth import CLOSED
from tests.conftest import StartServer
from tests.server import Json, body


@dataclass
class Owned:
    """Resources of one tenant, and who may see them."""

    owner: Client
    stranger: Client
    examples: dict[str, str]

    def path(self, template: str) -> str | None:
        """The address of a resource of the owner; None where a route names none."""
        path = template
        for name, value in self.examples.items():
            path = path.replace(f"{{{name}:path}}", value).replace(f"{{{name}}}", value)
        assert "{" not in path, f"{template} names a resource that this test does not know: give `owned` one"
        return path if path != template else None


@pytest.fixture(scope="module")
def owned(keyed: Keyed, model: Path) -> Owned:
    """A job, a batch and a blob of tenant `mine`; tenant `theirs` looks for them."""
    owner, stranger = keyed.client("mine"), keyed.client("theirs")
    batch = owner.post("/v1/batches", json={"items": [body(model, "parquet")]}).json()
    job = owner.run(body(model, "parquet") | {"labels": {"whose": "mine"}})
    artifact = owner.get(job["links"]["artifacts"]).json()["data"][0]["path"]
    owner.get(batch["links"]["self"], headers={"Prefer": "wait=60"})
    digest = hashlib.sha256(b"mine alone").hexdigest()
    assert owner.put(f"/v1/blobs/sha256:{digest}", content=b"mine alone").status_code == 201
    examples = {"job_id": job["id"], "batch_id": batch["id"], "path": artifact, "digest": digest, "code": "not_found"}
    return Owned(owner, stranger, examples)


def test_every_route_that_names_a_resource_knows_it_for_its_owner_only(owned: Owned) -> None:
    """Deleting comes last: the stranger's tries leave everything as it is."""
    tried = 0
    for method, template in sorted(CLOSED, key=lambda call: call[0] == "DELETE"):
        path = owned.path(template)
        if path is None:
            continue
        tried += 1
        for parameters in ({}, {"purge": "true"}) if method == "DELETE" else ({},):
            theirs = owned.stranger.request(method, path, params=parameters)
            # An upload names what it sends: it is taken for a new one, whatever others have.
            assert theirs.status_code == (400 if method == "PUT" else 404), (method, template, theirs.text)
    assert tried >= 10
    for method, template in CLOSED:
        path = owned.path(template)
        if path is not None and method != "DELETE":
            mine = owned.owner.request(method, path)
            assert mine.status_code == 200, (method, template, mine.text)


def test_what_is_not_there_and_what_is_not_mine_read_alike(owned: Owned) -> None:
    for id_ in ("job_id", "batch_id"):
        collection = "jobs" if id_ == "job_id" else "batches"
        known, unknown = owned.examples[id_], owned.examples[id_][:-4] + "0000"
        for tail in ("", "/events"):
            there, nowhere = (owned.stranger.get(f"/v1/{collection}/{one}{tail}") for one in (known, unknown))
            assert there.text.replace(known, unknown) == nowhere.text
            volatile = ("date", "ratelimit", "x-request-id")
            headers = [{k: v for k, v in r.headers.items() if k not in volatile} for r in (there, nowhere)]
            assert headers[0] == headers[1]


def test_lists_hold_nothing_of_others(owned: Owned) -> None:
    filters: list[Json] = [{}, {"status": "succeeded"}, {"kind": "quantize"}, {"label": "whose:mine"}]
    filters += [{"batch_id": owned.examples["batch_id"]}, {"created_after": "2020-01-01T00:00:00Z"}]
    filters += [{"after": owned.examples["job_id"][:-1] + "f"}]
    for method, template in CLOSED:
        if method != "GET" or owned.path(template) is not None:
            continue
        for parameters in filters if template == "/v1/jobs" else [{}]:
            text = owned.stranger.get(template, params=parameters).text
            assert not any(owned.examples[name] in text for name in ("job_id", "batch_id", "digest")), template
    found = [owned.owner.get("/v1/jobs", params=one).json()["data"] for one in filters]
    assert all(found), "the owner finds something with each"


def test_another_tenants_job_is_no_source(owned: Owned, model: Path) -> None:
    known, unknown = owned.examples["job_id"], owned.examples["job_id"][:-4] + "0000"
    for call in ("/v1/jobs", "/v1/plans", "/v1/batches"):
        answers = []
        for job_id in (known, unknown):
            asked = body({"type": "job", "job_id": job_id}, "parquet")
            response = owned.stranger.post(call, json={"items": [asked]} if call == "/v1/batches" else asked)
            assert response.status_code == 404, response.text
            assert response.json()["code"] == "model_not_found"
            answers.append(response.text.replace(job_id, ""))
        assert answers[0] == answers[1]
    asked = {"kind": "validate", "original": {"type": "uri", "uri": model.as_uri()}}
    response = owned.stranger.post("/v1/jobs", json=asked | {"quantized": {"type": "job", "job_id": known}})
    assert (response.status_code, response.json()["code"]) == (404, "model_not_found")
    mine = owned.owner.run(asked | {"quantized": {"type": "job", "job_id": known}})
    assert mine["result"]["passed"]


def test_another_tenants_blob_is_no_source(owned: Owned) -> None:
    digest = f"sha256:{owned.examples['digest']}"
    source = {"type": "blobs", "files": {"model.safetensors": digest}}
    response = owned.stranger.post("/v1/jobs", json=body(source, "parquet"))
    assert (response.status_code, response.json()["code"]) == (404, "blob_not_found")


def test_an_idempotency_key_is_its_tenants_own(owned: Owned, model: Path) -> None:
    headers = {"Idempotency-Key": "the-same"}
    jobs = [client.post("/v1/jobs", json=body(model, "parquet"), headers=headers) for client in
            (owned.owner, owned.stranger, owned.owner)]  # fmt: skip
    ids = [job.json()["id"] for job in jobs]
    assert ids[0] == ids[2] != ids[1]


def test_admins_see_everything_and_own_what_they_make(keyed: Keyed, owned: Owned, model: Path) -> None:
    admin = keyed.client("operators", Scope.ADMIN)
    job_id = owned.examples["job_id"]
    assert admin.get(f"/v1/jobs/{job_id}").status_code == 200
    assert job_id in admin.get("/v1/jobs", params={"label": "whose:mine"}).text
    made = admin.run(body(model, "parquet"))
    assert owned.owner.get(made["links"]["self"]).status_code == 404
    assert keyed.client("operators").get(made["links"]["self"]).status_code == 200
    assert admin.post("/v1/jobs", json=body({"type": "job", "job_id": job_id}, "parquet")).status_code == 404


def test_after_a_restart_tenants_and_keys_are_as_they_were(start_server: StartServer, model: Path) -> None:
    server = start_server(require_keys=True)
    with ApiKeys(server.data_dir) as keys:
        mine, theirs = (keys.create(tenant, [Scope.READ, Scope.SUBMIT])[1] for tenant in ("mine", "theirs"))
    with Client(server, None, mine) as client:
        job = client.run(body(model, "parquet"))
    server.stop()
    server.start()
    for text, status in ((mine, 200), (theirs, 404)):
        with Client(server, None, text) as client:
            assert client.get(job["links"]["self"]).status_code == status
