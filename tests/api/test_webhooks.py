"""Webhooks: every message arrives, signed, once its receiver lets it; and none goes where it must not."""

from __future__ import annotations

import base64
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from service.jobs.store import DATABASE
from service.jobs.webhooks.deliverer import AT_ONCE, AT_ONCE_TO_PLACE
from service.jobs.webhooks.resolver import AT_ONCE_OF_TENANT as LOOKUPS_AT_ONCE
from service.jobs.webhooks.secrets import SigningSecrets
from tests.api.conftest import save_model
from tests.api.keyed import Client, Keyed
from tests.api.test_jobs import large_model
from tests.api.test_metrics import scrape_until
from tests.conftest import StartServer
from tests.receiver import (
    Authority,
    Behaviour,
    Call,
    Receiver,
    drip_body,
    drip_headers,
    flood,
    garbage,
    hang_up,
    stall,
    status,
)
from tests.server import Json, Server, body, wait_until

#: What a server needs for receivers on this machine, and to lose little time over those that fail.
HERE = {"webhook_allowed_networks": "127.0.0.0/8", "webhook_allow_http": "true"}
SOON = {"webhook_retry_delays_s": "0.01,0.02,0.04,0.05,0.05", "webhook_timeout_s": 1}
PATIENT = {"webhook_retry_delays_s": "3600", "webhook_timeout_s": 60}
LEAST_S = 30.0


@pytest.fixture(scope="module", autouse=True)
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Servers that start here ask `zone.json` in this folder for addresses, and note it in `asked`."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "zone.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        path = [str(Path(__file__).parent / "names"), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        patch.setenv("NAMES", str(folder))
        yield folder


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_root: Path) -> Iterator[Server]:
    """A server that may tell this machine, and tries again soon."""
    with started(Server(tmp_path_factory.mktemp("webhooks") / "data", [model_root], **HERE, **SOON)) as running:
        make_secret(running)
        yield running


@pytest.fixture(scope="module")
def secret(server: Server) -> str:
    """What that server signs with, too."""
    return make_secret(server)


@pytest.fixture(scope="module")
def tiny(model_root: Path) -> Path:
    """A model of one small layer."""
    return save_model(model_root / "tiny", layers=1)


@contextmanager
def started(server: Server) -> Iterator[Server]:
    """A server that runs for a while and leaves no crash in its log."""
    server.start()
    yield server
    server.stop()
    assert "Traceback" not in server.log, server.log_end


def make_secret(server: Server, tenant: str = "default") -> str:
    with SigningSecrets(server.data_dir) as secrets:
        return secrets.create(tenant)[1]


def told(model: Path, url: str, *events: str) -> Json:
    """A job with a webhook."""
    return body(model, "parquet") | {"webhook": {"url": url} | ({"events": list(events)} if events else {})}


def deliveries(server: Server | Client, job_id: str, *, ended: bool = True, attempts: int = 0) -> list[Json]:
    """The job's deliveries once they have ended, or so many attempts were made in all."""
    deadline = time.monotonic() + LEAST_S
    while True:
        client = server.client if isinstance(server, Server) else server
        found: list[Json] = client.get(f"/v1/jobs/{job_id}").json()["webhook"]["deliveries"]
        made = sum(one["attempts"] for one in found)
        if found and made >= attempts and not (ended and any(one["status"] == "pending" for one in found)):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def verify(secret: str, call: Call) -> Any:
    """The message, as the receiver's library gives it out."""
    return Webhook(secret).verify(call.body, call.headers)


# --- messages ---


def test_a_message_is_signed_thin_and_shows_on_the_job(
    server: Server, secret: str, receiver: Receiver, tiny: Path
) -> None:
    job = server.run(told(tiny, receiver.url("/hook?token=hidden")))
    (call,) = receiver.wait("/hook")
    message = verify(secret, call)
    assert message == {
        "type": "job.succeeded",
        "timestamp": message["timestamp"],
        "data": {"job_id": job["id"], "status": "succeeded"},
    }
    ended = next(e for e in server.follow(job["id"]) if e["type"] == "job.succeeded")
    assert datetime.fromisoformat(message["timestamp"]) == datetime.fromisoformat(ended["at"])
    assert call.path == "/hook?token=hidden"
    assert call.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert call.headers["content-type"] == "application/json"
    assert call.headers["user-agent"].startswith("arrowquant/")
    assert re.fullmatch(r"msg_[0-9a-f-]{36}", call.id)
    assert abs(int(call.headers["webhook-timestamp"]) - time.time()) < 60
    (shown,) = deliveries(server, job["id"])
    assert shown.pop("created_at") <= shown.pop("delivered_at")
    expected = {"id": call.id, "event": "job.succeeded", "status": "delivered", "attempts": 1, "last_status_code": 204}
    assert shown == expected


def test_a_changed_message_or_another_secret_is_no_match(
    server: Server, secret: str, receiver: Receiver, tiny: Path
) -> None:
    server.run(told(tiny, receiver.url("/tampered")))
    (call,) = receiver.wait("/tampered")
    other = "whsec_" + base64.b64encode(b"another secret of some length").decode()
    with pytest.raises(WebhookVerificationError):
        verify(other, call)
    with pytest.raises(WebhookVerificationError):
        verify(secret, Call(call.path, call.headers, call.body.replace(b"succeeded", b"cancelled")))
    with pytest.raises(WebhookVerificationError):
        verify(secret, Call(call.path, call.headers | {"webhook-id": "msg_0"}, call.body))


def test_each_event_that_is_asked_for_is_a_message_of_its_own_and_no_other_is(
    server: Server, secret: str, receiver: Receiver, tiny: Path
) -> None:
    asked = ("job.queued", "job.started", "job.succeeded", "job.failed")
    job = server.run(told(tiny, receiver.url("/all"), *asked))
    calls = receiver.wait("/all", 3)
    assert [verify(secret, call)["type"] for call in calls] == ["job.queued", "job.started", "job.succeeded"]
    assert [call.message["data"]["status"] for call in calls] == ["queued", "running", "succeeded"]
    assert len({call.id for call in calls}) == 3
    assert [one["event"] for one in deliveries(server, job["id"])] == [call.message["type"] for call in calls]


def test_by_default_every_end_is_told(server: Server, receiver: Receiver, tiny: Path, model_root: Path) -> None:
    url = receiver.url("/ends")
    server.fail(told(tiny, url) | {"config": {"bit_width": 2, "min_accuracy": 1.0, "on_failure": "fail"}})
    slow = server.submit(told(large_model(model_root), url) | {"config": {"backend": "reference"}})
    server.wait_for(slow["id"], "job.started")
    server.cancel(slow["id"])
    calls = receiver.wait("/ends", 2)
    assert {call.message["type"] for call in calls} == {"job.failed", "job.cancelled"}


def test_items_of_a_batch_have_webhooks_of_their_own(server: Server, receiver: Receiver, tiny: Path) -> None:
    items = [told(tiny, receiver.url("/zero")), body(tiny, "parquet"), told(tiny, receiver.url("/two"))]
    batch = server.client.post("/v1/batches", json={"items": items}).json()
    for path, index in (("/zero", 0), ("/two", 2)):
        (call,) = receiver.wait(path)
        data = {"job_id": batch["job_ids"][index], "status": "succeeded", "batch_id": batch["id"], "batch_index": index}
        assert call.message["data"] == data
    assert "webhook" not in server.finish(batch["job_ids"][1])


def test_the_query_of_an_address_is_shown_nowhere(server: Server, receiver: Receiver, tiny: Path) -> None:
    url = receiver.url("/silent?key=s3cr3t", status(500))
    job = server.run(told(tiny, url, "job.queued", "job.succeeded"))
    deliveries(server, job["id"])
    assert all(call.path == "/silent?key=s3cr3t" for call in receiver.at("/silent"))
    shown = server.client.get(job["links"]["self"]).text
    assert json.loads(shown)["webhook"]["url"] == url.partition("?")[0] + "?…"
    assert "webhook" not in server.client.get("/v1/jobs").json()["data"][0], "a list has no deliveries"
    texts = [shown, server.client.get("/v1/jobs").text, json.dumps(server.follow(job["id"]))]
    events = server.client.get(job["links"]["events"], headers={"Accept": "application/json"})
    assert not [text for text in (*texts, events.text, server.log) if "s3cr3t" in text]


# --- receivers that fail ---


def test_a_message_is_sent_again_under_the_same_id_until_it_arrives(
    server: Server, secret: str, receiver: Receiver, tiny: Path
) -> None:
    url = receiver.url("/flaky", status(500), hang_up, garbage, status(404, body=b"x" * 100_000), status(201))
    job = server.run(told(tiny, url))
    (shown,) = deliveries(server, job["id"])
    calls = receiver.at("/flaky")
    assert (shown["status"], shown["attempts"], shown["last_status_code"]) == ("delivered", 5, 201)
    assert "last_error" not in shown
    assert "next_attempt_at" not in shown
    assert {call.id for call in calls} == {shown["id"]}
    assert len({call.body for call in calls}) == 1
    stamps = [int(call.headers["webhook-timestamp"]) for call in calls]
    assert stamps == sorted(stamps)
    assert all(verify(secret, call) for call in calls)


@pytest.mark.parametrize(
    ("behaviour", "told_as"),
    [
        (status(500, body=b"<b>inner words</b>"), "the receiver answered 500"),
        (hang_up, "the receiver did not answer in HTTP, or hung up without an answer"),
        (garbage, "the receiver did not answer in HTTP, or hung up without an answer"),
    ],
)
def test_when_nothing_helps_the_delivery_has_failed_and_says_why_in_our_words(
    server: Server, receiver: Receiver, tiny: Path, behaviour: Behaviour, told_as: str
) -> None:
    job = server.run(told(tiny, receiver.url("/broken", behaviour)))
    (shown,) = deliveries(server, job["id"])
    assert (shown["status"], shown["attempts"], shown["last_error"]) == ("failed", 6, told_as)
    assert len(receiver.at("/broken")) == 6
    assert "next_attempt_at" not in shown


def test_a_receiver_that_is_not_there_is_told_of(server: Server, tiny: Path) -> None:
    with Receiver() as gone:
        url = gone.url("/")
    (shown,) = deliveries(server, server.run(told(tiny, url))["id"])
    assert (shown["status"], shown["last_error"]) == ("failed", "the receiver takes no connections")


@pytest.mark.parametrize("behaviour", [stall, drip_headers], ids=["stall", "drip"])
def test_an_answer_that_does_not_come_is_cut_off_and_asked_for_again(
    server: Server, receiver: Receiver, tiny: Path, behaviour: Behaviour
) -> None:
    job = server.run(told(tiny, receiver.url("/slow", behaviour, status(204))))
    receiver.wait_for_cut("/slow")
    (shown,) = deliveries(server, job["id"])
    assert (shown["status"], shown["attempts"]) == ("delivered", 2)


@pytest.mark.parametrize("behaviour", [drip_body, flood], ids=["drip", "flood"])
def test_what_comes_behind_the_status_is_not_waited_for(
    server: Server, receiver: Receiver, tiny: Path, behaviour: Behaviour
) -> None:
    job = server.run(told(tiny, receiver.url("/more", behaviour)))
    receiver.wait_for_cut("/more")
    (shown,) = deliveries(server, job["id"])
    assert (shown["status"], shown["attempts"]) == ("delivered", 1)


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_redirects_are_failures(server: Server, receiver: Receiver, tiny: Path, code: int) -> None:
    elsewhere = receiver.url("/elsewhere")
    job = server.run(told(tiny, receiver.url("/moved", status(code, {"Location": elsewhere}))))
    (shown,) = deliveries(server, job["id"])
    assert (shown["status"], shown["last_status_code"]) == ("failed", code)
    assert shown["last_error"] == f"the receiver answered {code}; redirects are not followed"
    assert receiver.at("/elsewhere") == []


def test_after_410_nothing_more_comes_about_the_job(server: Server, receiver: Receiver, tiny: Path) -> None:
    asked = told(tiny, receiver.url("/gone", status(410)), "job.queued", "job.started", "job.succeeded")
    job = server.run(asked)
    first, *rest = deliveries(server, job["id"])
    assert (first["event"], first["status"], first["attempts"]) == ("job.queued", "failed", 1)
    assert {(one["status"], one["attempts"]) for one in rest} == {("skipped", 0)}
    assert len(rest) == 2
    other = server.run(asked)
    deliveries(server, other["id"])
    assert [call.message["data"]["job_id"] for call in receiver.at("/gone")] == [job["id"], other["id"]]


@pytest.mark.parametrize("code", [429, 503])
def test_a_receiver_may_ask_for_time_within_bounds(server: Server, receiver: Receiver, tiny: Path, code: int) -> None:
    much, a_date = "999999999", "Tue, 19 Jan 2038 03:14:07 GMT"
    for asked, low, high in (("3600", 3500, 3700), (much, 86000, 86500), (a_date, 86000, 86500)):
        job = server.run(told(tiny, receiver.url("/later", status(code, {"Retry-After": asked}))))
        (shown,) = deliveries(server, job["id"], ended=False, attempts=1)
        wait = (datetime.fromisoformat(shown["next_attempt_at"]) - datetime.now(UTC)).total_seconds()
        assert low < wait < high
        assert (shown["status"], shown["last_status_code"]) == ("pending", code)


@pytest.mark.parametrize(
    "asked",
    [
        "soon", "-5", "0", "", "1" * 400, "Thu, 01 Jan 1970 00:00:00 GMT",
        "Mon, 01 Jan 2024 00:00:00 +99999999999999999999", "Fri, 01 Jan 9999999999999999999999 00:00:00 GMT",
    ],
)  # fmt: skip
def test_what_a_receiver_asks_in_other_words_changes_nothing(
    server: Server, receiver: Receiver, tiny: Path, asked: str
) -> None:
    job = server.run(told(tiny, receiver.url("/odd", status(503, {"Retry-After": asked}), status(204))))
    assert deliveries(server, job["id"])[0]["attempts"] == 2


def test_a_fault_of_the_service_is_an_attempt_that_failed_and_holds_no_place(
    receiver: Receiver, model_root: Path, tiny: Path, tmp_path: Path
) -> None:
    server = Server(tmp_path / "data", [model_root], **HERE, **SOON).start()
    try:
        make_secret(server)
        with closing(sqlite3.connect(server.data_dir / DATABASE)) as db, db:
            whole = db.execute("SELECT secret FROM webhook_secrets").fetchone()
            # Nothing can be signed with a text.
            db.execute("UPDATE webhook_secrets SET secret = 'damaged'")
        items = {"items": [told(tiny, receiver.url("/lost"))] * (AT_ONCE_TO_PLACE + 1)}
        batch = server.client.post("/v1/batches", json=items, headers={"Prefer": "wait=60"}).json()
        for job_id in batch["job_ids"]:
            (shown,) = deliveries(server, job_id)
            assert (shown["status"], shown["attempts"]) == ("failed", 6)
            assert "the service has a fault" in shown["last_error"]
        assert "Traceback" in server.log
        with closing(sqlite3.connect(server.data_dir / DATABASE)) as db, db:
            db.execute("UPDATE webhook_secrets SET secret = ?", whole)
        server.run(told(tiny, receiver.url("/found")))
        receiver.wait("/found")
    finally:
        server.stop()


def test_a_delivery_that_is_damaged_ends_no_others(
    receiver: Receiver, model_root: Path, tiny: Path, tmp_path: Path
) -> None:
    server = Server(tmp_path / "data", [model_root], **HERE, **PATIENT).start()
    try:
        make_secret(server)
        job = server.run(told(tiny, receiver.url("/damaged", status(500))))
        deliveries(server, job["id"], ended=False, attempts=1)
        with closing(sqlite3.connect(server.data_dir / DATABASE)) as db, db:
            db.execute("UPDATE webhook_deliveries SET next_attempt_at = 'when it suits'")
        for path in ("/first", "/second"):
            server.run(told(tiny, receiver.url(path)))
            receiver.wait(path)
        assert "webhooks: a fault" in server.log
        assert "Traceback" in server.log
    finally:
        server.stop()


def test_purging_a_job_ends_its_deliveries(server: Server, receiver: Receiver, tiny: Path) -> None:
    job = server.run(told(tiny, receiver.url("/purged", status(503, {"Retry-After": "3600"}))))
    (shown,) = deliveries(server, job["id"], ended=False, attempts=1)
    with closing(sqlite3.connect(server.data_dir / DATABASE)) as db:
        query = "SELECT count(*) FROM webhook_deliveries WHERE id = ?"
        assert db.execute(query, (shown["id"],)).fetchone() == (1,)
        assert server.client.delete(job["links"]["self"], params={"purge": "true"}).status_code == 204
        assert db.execute(query, (shown["id"],)).fetchone() == (0,)


def test_a_dead_receiver_holds_up_nobody_else(start_server: StartServer, tiny: Path) -> None:
    server = start_server(**HERE, **PATIENT)
    make_secret(server)
    with Receiver() as dead, Receiver() as alive:
        items = [told(tiny, dead.url("/dead", stall))] * (AT_ONCE + 6)
        response = server.client.post("/v1/batches", json={"items": items}, headers={"Prefer": "wait=60"})
        assert response.json()["counts"]["succeeded"] == len(items)
        server.run(told(tiny, alive.url("/alive")))
        alive.wait("/alive")
        dead.wait("/dead", AT_ONCE_TO_PLACE)
        assert dead.most_at_once["/dead"] == AT_ONCE_TO_PLACE
        figures = scrape_until(server, "arrowquant_webhook_deliveries_pending", len(items))
        assert figures.value("arrowquant_webhook_attempts_open") == AT_ONCE_TO_PLACE
        assert figures.value("arrowquant_webhook_attempts_total", outcome="delivered") == 1
        assert figures.value("arrowquant_webhook_attempts_total", outcome="retried") == 0


def test_slow_name_servers_cost_others_nothing_and_whoever_waits_for_them_no_attempt(
    names: Path, receiver: Receiver, model_root: Path, tiny: Path, tmp_path: Path
) -> None:
    hosts = [f"{i}.slow.test" for i in range(LOOKUPS_AT_ONCE + 2)]
    (names / "zone.json").write_text(json.dumps({host: [["127.0.0.1"], None] for host in hosts}))
    keyed = Keyed(Server(tmp_path / "data", [model_root], require_keys=True, **HERE, **SOON))
    slow, other = keyed.client("slow"), keyed.client("other")
    for tenant in ("slow", "other"):
        make_secret(keyed.server, tenant)
    items = {"items": [told(tiny, receiver.url("/slow", host=host)) for host in hosts]}
    jobs = slow.post("/v1/batches", json=items, headers={"Prefer": "wait=60"}).json()["job_ids"]
    other.run(told(tiny, receiver.url("/other")))
    receiver.wait("/other")
    assert receiver.at("/slow") == []
    # The time at which they are sent was put off, and no attempt has failed.
    wait_until(lambda: len(list(put_off(slow, jobs))) == 2)
    waiting = list(put_off(slow, jobs))
    (names / "answered").touch()
    for job_id in jobs:
        (shown,) = deliveries(slow, job_id)
        assert shown["status"] == "delivered"
        assert shown["attempts"] == 1 or job_id not in waiting
    keyed.stop()


def put_off(client: Client, job_ids: list[str]) -> Iterator[str]:
    for job_id in job_ids:
        (shown,) = deliveries(client, job_id, ended=False)
        if not shown["attempts"] and shown["next_attempt_at"] > shown["created_at"]:
            yield job_id


# --- restarts ---


def test_a_kill_or_a_stop_between_or_within_attempts_loses_no_message(
    start_server: StartServer, receiver: Receiver, tiny: Path
) -> None:
    patient = {"webhook_retry_delays_s": "0.5,0.5,0.5", "webhook_timeout_s": 60}
    server = start_server(**HERE, **patient, drain_timeout_s=0.1)
    secret = make_secret(server)
    job = server.run(told(tiny, receiver.url("/killed", stall, stall, status(500), status(204))))
    receiver.wait("/killed")
    server.kill()
    receiver.wait_for_cut("/killed")
    server.start()
    receiver.wait("/killed", 2)
    server.stop()
    receiver.wait_for_cut("/killed", 2)
    server.start()
    deliveries(server, job["id"], ended=False, attempts=1)
    server.kill()
    server.start()
    calls = receiver.wait("/killed", 4)
    assert len({call.id for call in calls}) == 1
    assert {verify(secret, call)["data"]["job_id"] for call in calls} == {job["id"]}
    (shown,) = deliveries(server, job["id"])
    assert (shown["status"], shown["attempts"]) == ("delivered", 2), "an attempt that was cut off is not counted"


def test_a_job_that_is_killed_and_goes_on_is_told_of(
    start_server: StartServer, receiver: Receiver, model_root: Path
) -> None:
    server = start_server(**HERE)
    make_secret(server)
    asked = told(large_model(model_root), receiver.url("/resumed"), "job.started", "job.resumed", "job.cancelled")
    job = server.submit(asked)
    receiver.wait("/resumed")
    server.wait_for(job["id"], "tensor.completed")
    server.kill()
    server.start()
    server.wait_for(job["id"], "job.resumed")
    server.cancel(job["id"])
    server.finish(job["id"])
    deliveries(server, job["id"])
    ids: dict[str, str] = {call.id: call.message["type"] for call in receiver.at("/resumed")}
    assert list(ids.values()) == ["job.started", "job.resumed", "job.cancelled"]


# --- secrets and tenants ---


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, model_root: Path) -> Iterator[Keyed]:
    """A server with tenants."""
    data_dir = tmp_path_factory.mktemp("tenants") / "data"
    delays = {"webhook_retry_delays_s": "0.2,0.2,0.2,0.2,0.2"}
    running = Keyed(Server(data_dir, [model_root], require_keys=True, **HERE, **delays))
    yield running
    running.stop()


@pytest.fixture
def secrets(keyed: Keyed) -> Iterator[SigningSecrets]:
    """What an operator does beside that server."""
    with SigningSecrets(keyed.server.data_dir) as opened:
        yield opened


def test_while_secrets_are_changed_both_sign_and_a_revoked_one_no_more(
    keyed: Keyed, secrets: SigningSecrets, receiver: Receiver, tiny: Path
) -> None:
    client = keyed.client("rotating")
    (old, old_text), (_, new_text) = secrets.create("rotating"), secrets.create("rotating")
    client.run(told(tiny, receiver.url("/both")))
    (both,) = receiver.wait("/both")
    assert len(both.headers["webhook-signature"].split(" ")) == 2
    assert verify(old_text, both) == verify(new_text, both)
    secrets.revoke(old.id)
    client.run(told(tiny, receiver.url("/one")))
    (one,) = receiver.wait("/one")
    assert verify(new_text, one)
    with pytest.raises(WebhookVerificationError):
        verify(old_text, one)
    assert not any(text in keyed.server.log for text in (old_text, new_text))


def test_a_secret_that_has_expired_signs_no_more_and_is_forgotten(
    keyed: Keyed, secrets: SigningSecrets, receiver: Receiver, tiny: Path
) -> None:
    client = keyed.client("expiring")
    (old, old_text) = secrets.create("expiring")
    (_, new_text) = secrets.create("expiring", others_expire_at=datetime.now(UTC))
    client.run(told(tiny, receiver.url("/expired")))
    (call,) = receiver.wait("/expired")
    assert verify(new_text, call)
    with pytest.raises(WebhookVerificationError):
        verify(old_text, call)
    secrets.create("expiring")
    with closing(sqlite3.connect(keyed.server.data_dir / DATABASE)) as db:
        assert db.execute("SELECT secret FROM webhook_secrets WHERE id = ?", (old.id,)).fetchone() == (None,)


def test_without_a_secret_no_webhook_is_taken(keyed: Keyed, receiver: Receiver, tiny: Path) -> None:
    client = keyed.client("none")
    response = client.post("/v1/jobs", json=told(tiny, receiver.url("/")))
    assert (response.status_code, response.json()["code"]) == (422, "webhook_secret_missing")
    assert "`arrowquant webhooks secret create --tenant none`" in response.json()["detail"]
    assert response.json()["errors"][0]["pointer"] == "/webhook"
    assert client.get("/v1/jobs").json()["data"] == []


def test_a_message_that_nothing_can_sign_any_more_is_not_sent(
    keyed: Keyed, secrets: SigningSecrets, receiver: Receiver, tiny: Path
) -> None:
    client = keyed.client("careless")
    made, _ = secrets.create("careless")
    job = client.run(told(tiny, receiver.url("/unsigned", status(500))))
    receiver.wait("/unsigned")
    secrets.revoke(made.id)
    (shown,) = deliveries(client, job["id"])
    assert (shown["status"], shown["last_error"]) == ("failed", "tenant careless has no signing secret any more")
    assert all("v1," in call.headers["webhook-signature"] for call in receiver.at("/unsigned"))


def test_tenants_sign_with_their_own_secrets(
    keyed: Keyed, secrets: SigningSecrets, receiver: Receiver, tiny: Path
) -> None:
    clients = {name: keyed.client(name) for name in ("mine", "theirs")}
    texts = {name: secrets.create(name)[1] for name in clients}
    for name, other in (("mine", "theirs"), ("theirs", "mine")):
        job = clients[name].run(told(tiny, receiver.url(f"/{name}")))
        assert clients[other].get(job["links"]["self"]).status_code == 404
        (call,) = receiver.wait(f"/{name}")
        assert verify(texts[name], call)
        with pytest.raises(WebhookVerificationError):
            verify(texts[other], call)


# --- where webhooks may go ---


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Whom the strict server trusts."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, model_root: Path, authority: Authority) -> Iterator[Server]:
    """A server that calls the public internet, and one address beside."""
    allowed = {"webhook_allowed_networks": "127.0.0.2/32", "webhook_ca_file": authority.path}
    with started(Server(tmp_path_factory.mktemp("strict") / "data", [model_root], **allowed, **SOON)) as running:
        make_secret(running)
        yield running


@pytest.fixture(scope="module")
def strict_secret(strict: Server) -> str:
    """What it signs with, too."""
    return make_secret(strict)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:8000/", "https://127.1:8000/", "https://2130706433/", "https://0x7f000001/", "https://0/",
        "https://localhost/", "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://[::ffff:8.8.8.8]/",
        "https://[64:ff9b::7f00:1]/", "https://[64:ff9b::169.254.169.254]/", "https://[2002:7f00:1::]/", "https://[fe80::1]/",
        "https://10.0.0.1/", "https://172.16.0.1/", "https://192.168.1.1/", "https://100.64.0.1/", "https://169.254.169.254/",
        "https://[fd00:ec2::254]/", "https://168.63.129.16/", "https://224.0.0.1/", "https://255.255.255.255/",
        "https://private.test/", "https://mixed.test/", "https://nowhere.test/", "https://6to4.test/",
        "http://public.test/", "https://user:pass@public.test/", "https://user@public.test/",
        "https://@public.test/", "https://public.test:22/",
        "https://public.test:25/", "https://public.test:6667/", "https://public.test:0/", "https://public.test:65536/",
        "https://public.test/#part", "ftp://public.test/", "file:///etc/passwd", "public.test/", "//public.test/", "x",
        "https://", "https:///path", "https://public.test/a b", "https://public.test/\r\nX-Injected: 1",
        "https://public.test/\u2026", "https://pu\u00dflic.test/", "https://public.test\\@127.0.0.1/", "https://a..test/",
        "https://.test/", "https://[::1", "https://[fe80::1%25eth0]/", "https://%31%32%37.0.0.1/",
        f"https://{'a' * 64}.test/",
    ],
)  # fmt: skip
def test_no_webhook_goes_inside_or_where_it_cannot_be_meant(strict: Server, names: Path, tiny: Path, url: str) -> None:
    zone = {
        "localhost": [["127.0.0.1"]],
        "private.test": [["10.1.2.3"]],
        "mixed.test": [["93.184.215.14", "192.168.0.1"]],
        "6to4.test": [["2002:c0a8:1::1"]],
        "public.test": [["93.184.215.14"]],
    }
    (names / "zone.json").write_text(json.dumps(zone))
    before = strict.client.get("/v1/jobs").json()["data"]
    alone = strict.client.post("/v1/jobs", json=told(tiny, url))
    items = {"items": [body(tiny, "parquet"), told(tiny, url)]}
    among = strict.client.post("/v1/batches", json=items)
    for response, pointer in ((alone, "/webhook/url"), (among, "/items/1/webhook/url")):
        assert (response.status_code, response.json()["code"]) == (422, "webhook_refused"), response.text
        assert response.json()["errors"][0]["pointer"] == pointer
    assert strict.client.get("/v1/jobs").json()["data"] == before
    assert "X-Injected" not in strict.log


def test_what_is_private_and_what_does_not_exist_read_alike(strict: Server, names: Path, tiny: Path) -> None:
    (names / "zone.json").write_text(json.dumps({"inside.test": [["10.1.2.3"]]}))
    details = [
        strict.client.post("/v1/jobs", json=told(tiny, f"https://{name}/")).json()["detail"].replace(name, "")
        for name in ("inside.test", "nobody.test")
    ]
    assert details[0] == details[1]


def test_plain_http_is_refused_unless_it_is_allowed(strict: Server, tiny: Path) -> None:
    response = strict.client.post("/v1/jobs", json=told(tiny, "http://127.0.0.2:8000/"))
    assert response.json()["code"] == "webhook_refused"
    assert "ARROWQUANT_WEBHOOK_ALLOW_HTTP" in response.json()["detail"]


def test_a_name_that_leads_inside_by_the_time_of_the_delivery_leads_nowhere(
    strict: Server, authority: Authority, names: Path, tiny: Path
) -> None:
    (names / "zone.json").write_text(json.dumps({"rebinding.test": [["93.184.215.14"], ["127.0.0.1"]]}))
    with Receiver(certificate=authority.certificate("rebinding.test")) as inside:
        job = strict.run(told(tiny, inside.url("/", host="rebinding.test")))
        (shown,) = deliveries(strict, job["id"])
        assert (shown["status"], shown["attempts"]) == ("failed", 6)
        assert shown["last_error"].startswith("rebinding.test has no address now that this server may call")
        assert inside.connections == 0
    assert (names / "asked").read_text().split().count("rebinding.test") == 7, "once when created, once an attempt"


def test_the_address_that_was_checked_is_the_one_that_is_called(
    strict: Server, strict_secret: str, authority: Authority, names: Path, tiny: Path
) -> None:
    """Whoever looked the name up again between the check and the connection would be in the trap."""
    zone = {"twice.test": [["127.0.0.2"], ["127.0.0.2"], ["127.0.0.1"]]}
    (names / "zone.json").write_text(json.dumps(zone))
    certificate = authority.certificate("twice.test")
    with (
        Receiver("127.0.0.2", certificate=certificate) as checked,
        Receiver("127.0.0.1", checked.port, certificate) as trap,
    ):
        strict.run(told(tiny, checked.url("/", host="twice.test")))
        (call,) = checked.wait("/")
        assert verify(strict_secret, call)
        # The name stays what the certificate is for and what the receiver is told.
        assert call.headers["host"] == f"twice.test:{checked.port}"
        assert checked.server_names == ["twice.test"]
        assert trap.connections == 0
    assert (names / "asked").read_text().split().count("twice.test") == 2


def test_nothing_is_sent_to_whoever_has_no_certificate_for_the_name(
    strict: Server, authority: Authority, names: Path, tiny: Path, tmp_path: Path
) -> None:
    zone = {"hooks.test": [["127.0.0.2"]], "other.test": [["127.0.0.2"]]}
    (names / "zone.json").write_text(json.dumps(zone))
    with (
        Receiver("127.0.0.2", certificate=authority.certificate("hooks.test")) as another,
        Receiver("127.0.0.2", certificate=Authority(tmp_path).certificate("hooks.test")) as impostor,
    ):
        for url in (another.url("/", host="other.test"), impostor.url("/", host="hooks.test")):
            (shown,) = deliveries(strict, strict.run(told(tiny, url))["id"])
            assert shown["status"] == "failed"
            assert shown["last_error"].startswith("the receiver's certificate is not trusted: ")
        assert another.connections == impostor.connections == 6
        assert another.calls == impostor.calls == []


def test_a_request_names_events_that_there_are(strict: Server, tiny: Path) -> None:
    for events in ([], ["job.progress"], ["tensor.completed"], ["job.exploded"]):
        asked = told(tiny, "https://public.test/") | {"webhook": {"url": "https://public.test/", "events": events}}
        response = strict.client.post("/v1/jobs", json=asked)
        assert response.status_code == 422, events
        assert response.json()["errors"][0]["pointer"].startswith("/webhook/events")
