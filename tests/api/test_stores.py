"""Jobs that read from stores and write to them, over real HTTP, through faults, kills and cancels."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.engine.calibrations import gram, samples, save_safetensors
from tests.server import Server, body, validation, wait_until
from tests.stores import ACCESS_KEY, HUB_TOKEN, S3, SECRET_KEY, SECRETS, Answer, Call, Hub, Proxy, ranged, running_s3

MIB = 1 << 20
OTHER_COMMIT = "b" * 40
Fault = Callable[[Call, Callable[[], Answer]], Answer | None]


@dataclass
class World:
    """A server, the stores that it may name, and the ways to them."""

    server: Server
    s3: S3
    proxy: Proxy
    hub: Hub
    root: Path
    models: dict[str, Path]

    def start(self, data_dir: Path, **settings: object) -> Server:
        """Another server with the same stores; a setting that is None is not made."""
        chosen: dict[str, object] = {
            "remote_roots": "s3://models hf://",
            "s3_endpoint": self.proxy.url,
            "s3_region": "us-east-1",
            "hub_endpoint": self.hub.url,
            "store_allow_http": "true",
            "store_timeout_s": 5,
        }
        given = {name: value for name, value in (chosen | settings).items() if value is not None}
        return Server(data_dir, [self.root], **given).start()


def save_model(folder: Path, *, layers: int = 6, rows: int = 64, cols: int = 256) -> Path:
    """A model folder with a config and a tokenizer, and its weights in two files."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    names = [f"layers.{i}.weight" for i in range(layers)]
    weight_map = {}
    for shard in range(2):
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        mine = names[shard::2]
        save_file({name: rng.standard_normal((rows, cols), np.float32) for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """All of it, for the tests of this file."""
    root = tmp_path_factory.mktemp("world").resolve()
    models = {
        "small": save_model(root / "small"),
        "long": save_model(root / "long", layers=40, rows=64, cols=1024),
    }
    with running_s3() as s3, pytest.MonkeyPatch.context() as environment:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
            ("HF_TOKEN", HUB_TOKEN),
        ):
            environment.setenv(name, value)
        for bucket in ("models", "private"):
            s3.bucket(bucket)
        proxy, hub = Proxy(s3.url), Hub(HUB_TOKEN)
        for name, folder in models.items():
            s3.put_folder("models", name, folder)
            hub.put_folder(f"own/{name}", folder)
        made = World(None, s3, proxy, hub, root, models)  # type: ignore[arg-type]  # comes next
        made.server = made.start(root / "data")
        yield made
        made.server.stop()
        assert "Traceback" not in made.server.log, made.server.log_end
        proxy.close()
        hub.close()


@pytest.fixture(autouse=True)
def _whole(world: World) -> Iterator[None]:
    """Nothing is broken at the start of a test."""
    world.proxy.fault = lambda _, answered: answered()
    world.proxy.calls.clear()
    yield
    world.proxy.fault = lambda _, answered: answered()


def at(address: str) -> dict[str, Any]:
    """An address as a source."""
    return {"type": "uri", "uri": address}


def to(address: str, format_: str = "parquet") -> dict[str, Any]:
    """An output with an address of its own."""
    return {"format": format_, "uri": address}


ADDRESSES = ("s3://models/small", "hf://own/small@main", "s3://models/small/model.safetensors.index.json")


@pytest.fixture(scope="module")
def expected(world: World) -> dict[str, bytes]:
    """What a job makes of the small model when it is read from the disk."""
    job = world.server.run(body(world.models["small"], "parquet", "compressed-tensors"))
    return world.server.files(job["id"])


@pytest.mark.parametrize(
    "place", ["s3://models/fed/fed.safetensors", "s3://models/fed", "hf://own/fed@main/fed.safetensors"]
)
def test_a_calibration_is_read_from_where_models_are(world: World, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "fed"
    folder.mkdir()
    save_safetensors(folder / "fed.safetensors", {"layers.0.gram": gram(samples(100, 256))})
    world.s3.put_folder("models", "fed", folder)
    world.hub.put_folder("own/fed", folder)
    job = world.server.run(body(at("s3://models/small"), "parquet", method="auto") | {"calibration": at(place)})
    [output] = world.server.report(job["id"])["outputs"]
    assert {t["name"]: t["method"] for t in output["tensors"]}["layers.0.weight"] == "gptq"
    assert output["output_relative_error"] > 0
    absent = body(at("s3://models/small"), "parquet") | {"calibration": at("s3://models/fed/other.safetensors")}
    problem = world.server.client.post("/v1/jobs", json=absent).json()
    assert (problem["code"], problem["errors"][0]["pointer"]) == ("model_not_found", "/calibration/uri")


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_model_in_a_store_gives_the_bytes_of_the_same_model_on_disk(
    world: World, expected: dict[str, bytes], address: str
) -> None:
    if address.endswith("index.json"):  # alone, it brings no companions along
        index = world.models["small"] / "model.safetensors.index.json"
        expected = world.server.files(world.server.run(body(index, "parquet", "compressed-tensors"))["id"])
    job = world.server.run(body(at(address), "parquet", "compressed-tensors"))
    assert world.server.files(job["id"]) == expected
    assert world.server.leftovers(job["id"]) == [world.server.data_dir / "artifacts" / job["id"]]


@pytest.mark.parametrize("address", ADDRESSES)
def test_plans_and_validations_read_from_stores_as_well(world: World, address: str) -> None:
    client, asked = world.server.client, body(at(address), "parquet")
    plans = [client.post("/v1/plans", json=a) for a in (asked, body(world.models["small"], "parquet"))]
    assert [plan.status_code for plan in plans] == [200, 200]
    assert plans[0].json()["outputs"] == plans[1].json()["outputs"]
    job = world.server.run(validation(at(address), world.models["small"], min_accuracy=1.0))
    assert job["result"]["passed"]


def test_an_output_in_a_store_is_a_model_like_any_other(world: World, expected: dict[str, bytes]) -> None:
    server, target = world.server, "s3://models/out/whole"
    job = server.run(body(at("s3://models/small"), to(target), "compressed-tensors"))
    parquet = {path.removeprefix("parquet/"): data for path, data in expected.items() if path.startswith("parquet/")}
    assert world.s3.files("models", "out/whole") == parquet
    writes = [call.path for call in world.proxy.calls if call.method == "PUT" and "claim" not in call.path]
    assert writes[-1] == "/models/out/whole/manifest.json", "which tells readers that the rest is there"
    # Listed, downloaded whole and in part, and in the archive, as what lies on the server's disk.
    assert server.files(job["id"]) == expected
    part = server.client.get(
        f"/v1/jobs/{job['id']}/artifacts/parquet/model-00000.parquet", headers={"Range": "bytes=100-299"}
    )
    assert part.status_code == 206
    assert part.content == parquet["model-00000.parquet"][100:300]
    assert len(server.client.get(f"/v1/jobs/{job['id']}/archive").content) > sum(map(len, expected.values()))
    # Nothing of it stays on the disk, and it is a source by itself and by its job.
    assert not (server.data_dir / "work" / job["id"]).exists()
    assert not (server.data_dir / "artifacts" / job["id"] / "parquet").exists()
    for source in (at(target), {"type": "job", "job_id": job["id"], "output": "parquet"}):
        assert server.run(validation(world.models["small"], source, min_accuracy=0.9))["result"]["passed"]


def test_a_large_file_is_uploaded_in_parts(world: World) -> None:
    save_file({"w.bias": np.arange(12 * MIB, dtype=np.float32)}, world.root / "bias.safetensors")
    source = world.root / "bias.safetensors"
    job = world.server.run(body(source, to("s3://models/out/parts")))
    assert sum("partNumber" in call.path for call in world.proxy.calls) >= 3
    assert world.server.files(job["id"]).keys() == {f"parquet/{name}" for name in world.s3.files("models", "out/parts")}
    assert world.s3.unfinished_uploads("models") == 0


def test_an_artifact_that_was_removed_from_its_bucket_is_not_found(world: World) -> None:
    job = world.server.run(body(at("s3://models/small"), to("s3://models/out/removed")))
    assert world.s3.client.delete("/models/out/removed/model-00000.parquet").status_code == 204
    answer = world.server.client.get(f"/v1/jobs/{job['id']}/artifacts/parquet/model-00000.parquet")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


# --- addresses that are refused


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("s3://private/small", 403, "path_forbidden"),
        ("s3://models2/small", 403, "path_forbidden"),
        ("gs://models/small", 403, "path_forbidden"),
        ("s3://models/../private", 403, "path_forbidden"),
        ("s3://models/nothing", 404, "model_not_found"),
        ("hf://own/nothing", 404, "model_not_found"),
        ("hf://own/small@nothing", 404, "model_not_found"),
        ("s3://user:hunter2@models/small", 422, "invalid_config"),
        ("s3://models/small?X-Amz-Signature=hunter2", 422, "invalid_config"),
        ("s3://models/a%2e%2e", 422, "invalid_config"),
        ("ftp://models/small", 422, "invalid_config"),
    ],
)
def test_an_address_that_may_not_be_read_is_refused_at_once(world: World, source: str, status: int, code: str) -> None:
    answer = world.server.client.post("/v1/jobs", json=body(at(source), "parquet"))
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["errors"][0]["pointer"] == "/source/uri"
    assert "hunter2" not in answer.text + world.server.log


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("s3://private/out", 403, "path_forbidden"),
        ("s3://models/small", 409, "target_in_use"),
        ("hf://own/out", 422, "invalid_config"),
        ("s3://models/small/within", 422, "invalid_config"),
    ],
)
def test_an_address_that_may_not_be_written_is_refused_at_once(
    world: World, target: str, status: int, code: str
) -> None:
    answer = world.server.client.post("/v1/jobs", json=body(at("s3://models/small"), to(target)))
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["errors"][0]["pointer"] == "/outputs/0/uri"


def test_an_address_that_another_job_writes_to_is_not_free_above_or_below(world: World) -> None:
    with stalled(world, lambda call: call.method == "PUT" and "/out/held/" in call.path) as reached:
        job = world.server.submit(body(at("s3://models/small"), to("s3://models/out/held")))
        assert reached.wait(60)
        for target in ("s3://models/out/held", "s3://models/out/held/a", "s3://models/out"):
            answer = world.server.client.post("/v1/jobs", json=body(at("s3://models/small"), to(target)))
            assert (answer.status_code, answer.json()["code"]) == (409, "target_in_use"), target
    assert world.server.finish(job["id"])["status"] == "succeeded"


def test_what_somebody_else_puts_there_meanwhile_stays_and_fails_the_job(world: World) -> None:
    def meddle(call: Call, answered: Callable[[], Answer]) -> Answer:
        if call.method == "PUT" and call.path.endswith("/out/meddled/.arrowquant-claim"):
            world.s3.put("models", "out/meddled/theirs", b"theirs")
        return answered()

    world.proxy.fault = meddle
    problem = world.server.fail(body(at("s3://models/small"), to("s3://models/out/meddled")))
    assert problem["code"] == "target_in_use"
    assert world.s3.files("models", "out/meddled") == {"theirs": b"theirs"}


def test_the_claim_of_another_server_is_respected(world: World) -> None:
    def claim(call: Call, answered: Callable[[], Answer]) -> Answer:
        if call.method == "PUT" and call.path.endswith("/out/claimed/.arrowquant-claim"):
            world.s3.put("models", "out/claimed/.arrowquant-claim", b"job_of_another_server")
        return answered()

    world.proxy.fault = claim
    problem = world.server.fail(body(at("s3://models/small"), to("s3://models/out/claimed")))
    assert problem["code"] == "target_in_use"
    assert world.s3.files("models", "out/claimed") == {".arrowquant-claim": b"job_of_another_server"}


# --- changes, faults, cancels


def test_a_model_that_changes_while_it_is_read_fails_the_job_and_is_named(world: World) -> None:
    world.s3.put_folder("models", "changing", world.models["long"])
    name = "model-00002-of-00002.safetensors"

    def change(call: Call, answered: Callable[[], Answer]) -> Answer:
        # After the header and the first window of the second file have been read.
        if call.path.endswith(name) and not call.headers.get("range", "").startswith("bytes=0-"):
            world.s3.put("models", f"changing/{name}", (world.models["long"] / name).read_bytes()[::-1])
        return answered()

    world.proxy.fault = change
    problem = world.server.fail(body(at("s3://models/changing"), "parquet"))
    assert problem["code"] == "source_changed"
    assert name in problem["detail"]


@pytest.mark.parametrize("fault", ["reset", "unavailable", "cut"])
def test_a_store_with_passing_faults_gives_the_same_bytes(
    world: World, expected: dict[str, bytes], fault: str, request: pytest.FixtureRequest
) -> None:
    seen: set[str] = set()
    target = f"out/faults-{request.node.callspec.id}"

    def once(call: Call, answered: Callable[[], Answer]) -> Answer | None:
        about = f"{call.method} {call.path.partition('?')[0]}"
        if about in seen:
            return answered()
        seen.add(about)
        if fault == "unavailable":
            return Answer(503, b"<Error><Code>SlowDown</Code></Error>")
        if fault == "reset":
            return None
        answer = answered()
        answer.cut = len(answer.body) // 2
        return answer

    world.proxy.fault = once
    job = world.server.run(body(at("s3://models/small"), to(f"s3://models/{target}")))
    world.proxy.fault = lambda _, answered: answered()
    assert world.server.files(job["id"]) == {p: d for p, d in expected.items() if p.startswith("parquet/")}
    assert len(seen) > 6


def test_a_store_that_stays_away_fails_the_job_clearly_and_leaves_nothing(world: World) -> None:
    def away(call: Call, answered: Callable[[], Answer]) -> Answer | None:
        return Answer(500) if "parquet" in call.path and call.method == "PUT" else answered()

    world.proxy.fault = away
    problem = world.server.fail(body(at("s3://models/small"), to("s3://models/out/away")))
    assert problem["code"] == "store_unavailable"
    assert "HTTP 500" in problem["detail"]
    assert world.s3.files("models", "out/away") == {}


@contextmanager
def stalled(world: World, which: Callable[[Call], bool]) -> Iterator[threading.Event]:
    """Calls like this are not answered inside of the block; the event tells that one has come."""
    reached, released = threading.Event(), threading.Event()

    def stall(call: Call, answered: Callable[[], Answer]) -> Answer | None:
        if which(call):
            reached.set()
            released.wait(60)
        return answered()

    world.proxy.fault = stall
    try:
        yield reached
    finally:
        released.set()


@pytest.mark.parametrize("moment", ["reading", "uploading"])
def test_a_cancel_is_heard_while_a_store_does_not_answer_and_nothing_stays_there(world: World, moment: str) -> None:
    def which(call: Call) -> bool:
        if moment == "reading":
            return call.method == "GET" and ".safetensors" in call.path
        return call.method == "PUT" and call.path.endswith(".parquet")

    with stalled(world, which) as reached:
        job = world.server.submit(body(at("s3://models/long"), to(f"s3://models/out/cancelled-{moment}")))
        assert reached.wait(60)
        world.server.cancel(job["id"])
        if moment == "reading":  # nothing that was begun has to be ended first
            assert world.server.finish(job["id"])["status"] == "cancelled"
    assert world.server.finish(job["id"])["status"] == "cancelled"
    assert world.s3.files("models", f"out/cancelled-{moment}") == {}
    assert world.s3.unfinished_uploads("models") == 0
    assert world.server.leftovers(job["id"]) == []


def test_an_upload_that_a_cancel_walks_away_from_leaves_nothing_when_it_ends_later(world: World) -> None:
    reached, ended, landed = threading.Event(), threading.Event(), threading.Event()

    def late(call: Call, answered: Callable[[], Answer]) -> Answer:
        if not (call.method == "PUT" and call.path.endswith(".parquet")):
            return answered()
        reached.set()
        ended.wait(4)  # longer than anybody waits for it before the files are taken back
        answer = answered()
        landed.set()
        return answer

    world.proxy.fault = late
    job = world.server.submit(body(at("s3://models/small"), to("s3://models/out/late")))
    assert reached.wait(60)
    world.server.cancel(job["id"])
    assert world.server.finish(job["id"])["status"] == "cancelled"
    ended.set()
    assert landed.wait(60)
    assert world.s3.files("models", "out/late") == {}


def test_a_server_starts_without_a_store_that_does_not_let_it_clear_away(world: World, tmp_path: Path) -> None:
    server = world.start(tmp_path / "data", store_timeout_s=20)
    try:
        with stalled(world, lambda call: call.method == "PUT" and call.path.endswith(".parquet")) as reached:
            job = server.submit(body(at("s3://models/small"), to("s3://models/out/restart")))
            assert reached.wait(60)
            server.cancel(job["id"])
            server.kill()
        with stalled(world, lambda _: True) as reached:
            server.start()
            assert reached.wait(60)
            assert server.job(job["id"])["status"] == "cancelling"
        assert server.finish(job["id"])["status"] == "cancelled"
        assert world.s3.files("models", "out/restart") == {}
        assert server.leftovers(job["id"]) == []
    finally:
        server.stop()


def test_nothing_of_the_operators_credentials_is_ever_seen(world: World, tmp_path: Path) -> None:
    told = " ".join(SECRETS)
    answers: list[str] = []
    server = world.start(tmp_path / "data", store_timeout_s=0.5, log_level="debug")
    try:
        client = server.client

        def ask(source: str, *outputs: Any) -> None:
            for path in ("/v1/plans", "/v1/jobs"):
                answer = client.post(path, json=body(at(source), *(outputs or ("parquet",))))
                answers.append(answer.text)
                if answer.status_code == 202:
                    job = server.finish(answer.json()["id"])
                    answers.append(json.dumps(job))
                    for part in ("events", "artifacts", "report"):
                        headers = {"Accept": "application/json"}
                        answers.append(client.get(f"/v1/jobs/{job['id']}/{part}", headers=headers).text)
                    for artifact in (job["status"] == "succeeded" and server.artifacts(job["id"])) or []:
                        answers.append(client.get(f"/v1/jobs/{job['id']}/artifacts/{artifact['path']}").text)

        ask("s3://models/small", to("s3://models/out/secret"))
        ask("hf://own/small")
        ask("s3://models/nothing")
        ask("hf://own/nothing")
        for status in (400, 401, 403, 404, 500):
            world.proxy.fault = lambda _, __, s=status: Answer(s, f"<Error><Message>{told}</Message></Error>".encode())
            ask("s3://models/small")
        # Let in at first, and refused when the job reads, writes, or takes back what it wrote.
        places = ((403, ".safetensors"), *((s, p) for s in (403, 409, 412) for p in (".parquet", "delete", "manifest")))
        for status, which in places:

            def later(call: Call, answered: Callable[[], Answer], status: int = status, which: str = which) -> Answer:
                refused = Answer(status, f"<Error><Message>{told}</Message></Error>".encode())
                return refused if which in f"{call.method} {call.path}" else answered()

            world.proxy.fault = later
            ask("s3://models/small", to(f"s3://models/out/secret-{which.strip('.')}-{status}"))
        world.proxy.fault = lambda _, __: None
        ask("s3://models/small")
        world.hub.token = "another"
        ask("hf://own/small")
        answers += [client.get(path).text for path in ("/v1/jobs", "/metrics", "/readyz", "/openapi.json")]
    finally:
        world.hub.token = HUB_TOKEN
        server.stop()
    stored = b"".join(path.read_bytes() for path in server.data_dir.rglob("*") if path.is_file())
    assert len(answers) > 40
    assert "Traceback" not in server.log
    for secret in (*SECRETS, "Signature="):
        assert not any(secret in answer for answer in answers), secret
        assert secret not in server.log
        assert secret.encode() not in stored


@pytest.mark.parametrize("status", [409, 412])
def test_a_store_that_refuses_to_remove_by_a_conflict_neither_holds_a_job_up_nor_its_lane(
    world: World, status: int
) -> None:
    def conflict(call: Call, answered: Callable[[], Answer]) -> Answer:
        if call.method == "PUT" and call.path.endswith(".parquet"):
            return Answer(403)
        return Answer(status, b"<Error/>") if "?delete" in call.path or call.method == "DELETE" else answered()

    world.proxy.fault = conflict
    problem = world.server.fail(body(at("s3://models/small"), to(f"s3://models/out/conflict-{status}")))
    assert problem["code"] == "store_refused"
    assert "could not be removed" in world.server.log


@pytest.mark.parametrize("status", [409, 412])
def test_a_store_that_answers_an_upload_or_a_listing_with_a_conflict_is_no_crash(world: World, status: int) -> None:
    asked = body(at("s3://models/small"), to(f"s3://models/out/refused-{status}"))
    refused: Callable[[Call], bool] = lambda call: call.method == "PUT" and call.path.endswith(".parquet")  # noqa: E731
    world.proxy.fault = lambda call, answered: Answer(status, b"<Error/>") if refused(call) else answered()
    assert world.server.fail(asked)["code"] == "store_unavailable"
    world.proxy.fault = lambda call, answered: Answer(status, b"<Error/>") if "list-type" in call.path else answered()
    answer = world.server.client.post("/v1/jobs", json=asked)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")


def test_the_hub_that_its_own_tools_are_set_to_is_read_where_no_other_is_named(
    world: World, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", world.hub.url)
    server = world.start(tmp_path / "data", hub_endpoint=None)
    try:
        assert server.files(server.run(body(at("hf://own/small"), "parquet", "compressed-tensors"))["id"]) == expected
    finally:
        server.stop()


def test_calls_that_need_no_store_do_not_wait_for_those_of_one_that_hangs(world: World, tmp_path: Path) -> None:
    server = world.start(tmp_path / "data", store_timeout_s=60)
    client = server.client
    job = server.run(body(at("s3://models/small"), to("s3://models/out/hanging"), "compressed-tensors"))
    here = f"/v1/jobs/{job['id']}"
    submitted = {"json": body(at("s3://models/small"), "parquet")}

    def hang(method: str, path: str, **more: Any) -> httpx.Response:
        return httpx.request(method, server.base_url + path, timeout=120, **more)

    calls = len(world.proxy.calls)
    try:
        with stalled(world, lambda _: True), ThreadPoolExecutor(60) as threads:
            hanging = [threads.submit(hang, "POST", path, **submitted) for path in ["/v1/jobs", "/v1/plans"] * 6]
            path = f"{here}/artifacts/parquet/model-00000.parquet"
            hanging += [threads.submit(hang, "GET", path) for _ in range(40)]
            wait_until(lambda: len(world.proxy.calls) >= calls + 50)
            begun = body(world.models["small"], "parquet")
            answers = [
                client.get("/v1/jobs"),
                client.get(f"{here}/report"),
                client.get(f"{here}/artifacts/compressed-tensors/config.json"),
                client.get("/metrics"),
                client.get("/readyz"),
                client.post("/v1/plans", json=begun),
                client.post("/v1/jobs", json=begun),
            ]
            assert not any(call.done() for call in hanging), "all of this came before any of those"
            assert [answer.status_code for answer in answers] == [200] * 6 + [202]
            refused = [call.result() for call in hanging]  # by a store that goes on hanging
        assert {(call.status_code, call.json()["code"]) for call in refused} == {(503, "store_unavailable")}
        assert all("retry-after" in call.headers for call in refused)
    finally:
        server.stop()


def test_a_batch_looks_at_each_address_once_and_at_several_together(world: World) -> None:
    together, most, sources = 0, 0, 0
    lock, several = threading.Lock(), threading.Event()

    def watch(call: Call, answered: Callable[[], Answer]) -> Answer:
        nonlocal together, most, sources
        if "list-type" not in call.path:
            return answered()
        with lock:
            together, sources = together + 1, sources + ("small" in call.path)
            most = max(most, together)
        if most > 4:
            several.set()
        if "bunch" in call.path:
            several.wait(20)  # nobody is answered before others have come
        answer = answered()
        with lock:
            together -= 1
        return answer

    world.proxy.fault = watch
    items = [body(at("s3://models/small"), to(f"s3://models/out/bunch-{index}")) for index in range(12)]
    items.append(body(at("s3://private/small"), "parquet"))
    refused = world.server.client.post("/v1/batches", json={"items": items})
    assert (refused.status_code, refused.json()["code"]) == (403, "path_forbidden")
    assert refused.json()["errors"][0]["pointer"] == "/items/12/source/uri"
    assert several.is_set()
    assert sources == 1
    items = [body(at("s3://models/nothing"), "parquet") for _ in range(3)]
    refused = world.server.client.post("/v1/batches", json={"items": items})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (404, "/items/0/source/uri")


# --- kills


def test_a_job_killed_while_it_reads_goes_on_behind_its_checkpoint_at_the_same_commit(
    world: World, tmp_path: Path
) -> None:
    # A commit of its own that `main` names only until the server is killed.
    world.hub.put_folder("own/moving", world.models["long"])
    config: dict[str, Any] = {"method": "mse", "backend": "reference"}
    asked = body(at("hf://own/moving@main"), "parquet", **config)
    server = world.start(tmp_path / "data", block_bytes=1 << 18)
    try:
        job = server.submit(asked)
        server.wait_for(job["id"], "tensor.completed", 5)
        server.kill()
        world.hub.put_folder("own/moving", world.models["small"], revision=OTHER_COMMIT)
        world.hub.revisions["main"] = OTHER_COMMIT
        server.start()
        assert server.finish(job["id"])["status"] == "succeeded"
        events = server.follow(job["id"])
        done = [event["name"] for event in events if event["type"] == "tensor.completed"]
        assert len(done) == len(set(done)) == 40
        undisturbed = server.run(body(world.models["long"], "parquet", **config))
        assert server.files(job["id"]) == server.files(undisturbed["id"])
    finally:
        world.hub.revisions["main"] = "a" * 40
        server.stop()


def test_a_model_that_changed_while_the_server_was_down_is_not_gone_on_with(world: World, tmp_path: Path) -> None:
    world.s3.put_folder("models", "replaced", world.models["long"])
    config: dict[str, Any] = {"method": "mse", "backend": "reference"}
    server = world.start(tmp_path / "data", block_bytes=1 << 18)
    try:
        job = server.submit(body(at("s3://models/replaced"), "parquet", **config))
        server.wait_for(job["id"], "tensor.completed", 5)
        server.kill()
        name = "model-00001-of-00002.safetensors"
        data = bytearray((world.models["long"] / name).read_bytes())
        data[-MIB:] = bytes(MIB)  # the same size and header
        world.s3.put("models", f"replaced/{name}", bytes(data))
        server.start()
        assert server.finish(job["id"])["status"] == "succeeded"
        fresh = server.run(body(at("s3://models/replaced"), "parquet", **config))
        assert server.files(job["id"]) == server.files(fresh["id"])
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("which", "answered_first"),
    [
        (".arrowquant-claim", True),
        ("model-00000.parquet", False),
        ("tokenizer.json", True),
        ("manifest.json", True),
        ("?delete", True),
    ],
)
def test_a_server_killed_while_it_uploads_goes_on_without_duplicates(
    world: World, expected: dict[str, bytes], tmp_path: Path, which: str, answered_first: bool
) -> None:
    target = f"out/killed-{which.strip('.?')}-{answered_first}"
    reached, released = threading.Event(), threading.Event()

    def kill_then(call: Call, answered: Callable[[], Answer]) -> Answer | None:
        is_it = call.method in ("PUT", "POST") and call.path.endswith(which)
        if not is_it or reached.is_set():
            return answered()
        answer = answered() if answered_first else None
        reached.set()
        released.wait(60)
        return answer

    server = world.start(tmp_path / "data")
    try:
        world.proxy.fault = kill_then
        job = server.submit(body(at("s3://models/small"), to(f"s3://models/{target}")))
        assert reached.wait(60)
        server.kill()
        released.set()
        server.start()
        assert server.finish(job["id"])["status"] == "succeeded", server.job(job["id"])
        parquet = {p.removeprefix("parquet/"): d for p, d in expected.items() if p.startswith("parquet/")}
        assert world.s3.files("models", target) == parquet
        assert not (server.data_dir / "work" / job["id"]).exists()
    finally:
        server.stop()


# --- memory


def test_a_large_file_of_a_store_is_read_in_bounded_memory_and_never_lands_on_the_disk(
    world: World, tmp_path: Path
) -> None:
    size = 300 * MIB
    save_file({"w.weight": np.zeros((size // 4096, 1024), np.float32)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    world.s3.put("models", "large/model.safetensors", data)
    listed = world.s3.client.head("/models/large/model.safetensors").headers

    def answer_ranges(call: Call, answered: Callable[[], Answer]) -> Answer:
        if not call.range_bytes:
            return answered()
        answer = ranged(data, call, etag=listed["ETag"])  # moto reads all of an object for each range of it
        answer.headers["Last-Modified"] = listed["Last-Modified"]
        return answer

    server = world.start(tmp_path / "data", block_bytes=MIB)
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, server.anonymous_bytes())

    try:
        server.run(body(at("s3://models/small"), "compressed-tensors", method="minmax"))
        before = server.anonymous_bytes()
        world.proxy.fault = answer_ranges
        watching = threading.Thread(target=watch)
        watching.start()
        try:
            job = server.run(body(at("s3://models/large"), "compressed-tensors", method="minmax"))
        finally:
            ended.set()
            watching.join()
        print(f"{(peak - before) / MIB:.0f} MiB more than before, for {size / MIB:.0f} MiB read")
        assert peak - before < 100 * MIB
        stored = sum(p.stat().st_size for p in server.data_dir.rglob("*") if p.is_file())
        assert stored < size / 4
        assert job["result"]["original_bytes"] >= size
    finally:
        server.stop()


def test_the_command_line_hands_an_address_on(world: World, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "service", "quantize", "s3://models/small", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    answer = run("--out", str(tmp_path / "q"), "--server", world.server.base_url)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "q" / "compressed-tensors" / "manifest.json").exists()
    answer = run("--out", str(tmp_path / "r"))
    assert answer.returncode == 2
    assert "--server" in answer.stderr
