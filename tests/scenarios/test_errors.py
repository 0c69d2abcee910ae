"""Whatever is wrong with a request or a model is said with a code and a name, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import StartServer
from tests.engine.helpers import files_of, save, save_folder
from tests.scenarios.conftest import NewModel, Weights
from tests.server import Json, Server, body, validation


def refused(server: Server, asked: Json, status: int, code: str) -> Json:
    """The problem that answers a job which is not accepted; every problem has the same form."""
    before = server.client.get("/v1/jobs", params={"limit": 1}).json()["data"]
    response = server.client.post("/v1/jobs", json=asked)
    assert response.headers["content-type"] == "application/problem+json"
    problem: Json = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    assert problem["status"] == status
    assert problem["type"] == f"/problems/{code}"
    assert problem["title"]
    assert problem["detail"]
    assert server.client.get("/v1/jobs", params={"limit": 1}).json()["data"] == before, "it was accepted all the same"
    return problem


# Requests


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"colour": "blue"}, "/colour"),
        ({"config": {"bitwidth": 4}}, "/config/bitwidth"),
        ({"config": {"bit_width": 1}}, "/config/bit_width"),
        ({"config": {"bit_width": 9}}, "/config/bit_width"),
        ({"config": {"bit_width": "many"}}, "/config/bit_width"),
        ({"config": {"group_size": 17}}, "/config/group_size"),
        ({"config": {"min_accuracy": 1.5}}, "/config/min_accuracy"),
        ({"config": {"scheme": "int7"}}, "/config/scheme"),
        ({"config": {"method": "guess"}}, "/config/method"),
        ({"config": {"layers": [{"match": "*", "bit_width": 7}]}}, "/config/layers/0/bit_width"),
        ({"profile": "toaster"}, "/profile"),
        ({"kind": "compress"}, "/kind"),
        ({"source": {"type": "post", "uri": "file:///x"}}, "/source/type"),
        ({"source": {"type": "uri"}}, "/source/uri"),
        ({"outputs": []}, "/outputs"),
        ({"outputs": [{"format": "parquet", "shape": 3}]}, "/outputs/0/shape"),
        ({"outputs": [{"format": "parquet"}, {"format": "parquet", "config": {"bit_width": 99}}]},
         "/outputs/1/config/bit_width"),
        ({"outputs": [{"format": "parquet", "name": "../up"}]}, "/outputs/0/name"),
        ({"timeout_s": -1}, "/timeout_s"),
        ({"timeout_s": 0}, "/timeout_s"),
        ({"priority": 1000}, "/priority"),
        ({"labels": {"a": 7}}, "/labels/a"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_field_is_named(server: Server, new_model: NewModel, change: Json, pointer: str) -> None:
    problem = refused(server, body(new_model(layers=1), "parquet") | change, 422, "invalid_request")
    assert pointer in {entry["pointer"] for entry in problem["errors"]}, problem
    assert all(entry["detail"] for entry in problem["errors"])


@pytest.mark.parametrize(
    ("outputs", "code", "pointer"),
    [
        ([{"format": "zip"}], "invalid_config", "/outputs/0/format"),
        ([{"format": "parquet"}, {"format": "safetensors"}], "unsupported_by_format", "/outputs/1/format"),
        ([{"format": "parquet"}, {"format": "parquet"}], "invalid_config", "/outputs"),
        ([{"format": "parquet", "options": {"speed": 11}}], "invalid_config", "/outputs/0/options/speed"),
        ([{"format": "parquet", "uri": "data:,x"}], "invalid_config", "/outputs/0/uri"),
    ],
    ids=str,
)
def test_an_output_that_cannot_be_is_named(
    server: Server, new_model: NewModel, outputs: list[Json], code: str, pointer: str
) -> None:
    problem = refused(server, body(new_model(layers=1), *outputs), 422, code)
    assert problem["errors"][0]["pointer"] == pointer


def test_what_is_no_json_is_said_to_be_none(server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (b"", b"{", b"\xff\xfe", b'{"kind": "quantize"'):
        response = server.client.post("/v1/jobs", content=content, headers=headers)
        assert response.status_code in (400, 422), content
        assert response.headers["content-type"] == "application/problem+json"
    response = server.client.post("/v1/jobs", content=b"kind=quantize", headers={"Content-Type": "text/plain"})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


def test_nothing_outside_the_model_roots_can_be_named(
    server: Server, new_model: NewModel, place: Path, tmp_path: Path
) -> None:
    secret = save_folder(tmp_path / "secret", {"key.weight": np.ones((64, 64), np.float32)})
    (place / "link").symlink_to(secret)
    inside = new_model(layers=1)
    addresses = [
        secret.as_uri(),
        (tmp_path / "not-there").as_uri(),
        "file:///etc/passwd",
        (place / "link").as_uri(),
        (place / "link" / "model.safetensors").as_uri(),
        f"file://{place}/../../etc/passwd",
        f"file://{inside}/../{inside.name}",
        f"file://{place}/%2e%2e/%2e%2e/etc/passwd",
        f"file://{place}/..%2f..%2fetc/passwd",
        server.data_dir.as_uri(),
    ]
    answers = set()
    for address in addresses:
        problem = refused(server, body({"type": "uri", "uri": address}, "parquet"), 403, "path_forbidden")
        answers.add(problem["detail"])
        assert problem["errors"][0]["pointer"] == "/source/uri"
    assert len(answers) == 1, "what is there and what is not is answered alike"
    assert str(tmp_path) not in answers.pop()


@pytest.mark.parametrize("target", ["model.safetensors", "nothing"])
def test_a_link_in_a_model_that_leads_outside_is_named(
    server: Server, place: Path, tmp_path: Path, target: str
) -> None:
    secret = save_folder(tmp_path / "secret", {"key.weight": np.ones((64, 64), np.float32)})
    mixed = save_folder(place / "mixed", {"w.weight": np.ones((64, 64), np.float32)})
    (mixed / "model.safetensors").rename(mixed / "shard.safetensors")
    index = mixed / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w.weight": "shard.safetensors", "x": "leak.safetensors"}}))
    (mixed / "leak.safetensors").symlink_to(secret / target)
    for source in (mixed, index):
        problem = refused(server, body(source, "parquet"), 403, "path_forbidden")
        assert problem["detail"].startswith("'leak.safetensors' in the model is a link that leads outside")
        assert problem["errors"][0]["pointer"] == "/source/uri"
        assert str(tmp_path) not in json.dumps(problem)


def test_nothing_is_written_outside_the_model_roots(
    server: Server, new_model: NewModel, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (place / "way-out").symlink_to(tmp_path / "elsewhere")
    for target in (tmp_path / "elsewhere" / "new", place / "way-out" / "new", place / "way-out"):
        output = {"format": "parquet", "uri": target.as_uri()}
        problem = refused(server, body(new_model(layers=1), output), 403, "path_forbidden")
        assert problem["errors"][0]["pointer"] == "/outputs/0/uri"
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_link_put_in_place_of_an_accepted_model_leads_nowhere(
    start_server: StartServer, new_model: NewModel, place: Path, tmp_path: Path
) -> None:
    server = start_server(max_running_jobs=1, threads=1)
    busy = server.submit(body(new_model(layers=12), "parquet", backend="reference"))["id"]
    accepted = save_folder(place / "accepted", {"w.weight": np.ones((64, 64), np.float32)})
    job_id = server.submit(body(accepted, "parquet"))["id"]
    accepted.rename(tmp_path / "outside")
    accepted.symlink_to(tmp_path / "outside")
    assert server.job(job_id)["status"] == "queued", "it was to wait for the other"
    job = server.finish(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "path_forbidden")
    assert server.finish(busy)["status"] == "succeeded"


def test_a_pipe_in_the_place_of_a_model_blocks_nobody(server: Server, new_model: NewModel, place: Path) -> None:
    os.mkfifo(place / "model.safetensors")
    refused(server, body(place / "model.safetensors", "parquet"), 422, "unsupported_model")
    beside = new_model(layers=1)
    os.mkfifo(beside / "notes.txt")
    refused(server, body(beside, "parquet"), 422, "unsupported_model")


def test_a_model_that_is_not_there_is_not_found(server: Server, place: Path) -> None:
    (place / "empty").mkdir()
    (place / "texts").mkdir()
    (place / "texts" / "README.md").write_text("no weights here")
    for name in ("nothing", "empty", "texts"):
        refused(server, body(place / name, "parquet"), 404, "model_not_found")
    problem = refused(server, validation(place / "nothing", place / "nothing"), 404, "model_not_found")
    assert problem["errors"][0]["pointer"] == "/original/uri"


def test_pickled_weights_are_refused_with_the_way_to_convert_them(server: Server, place: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        folder = place / f"pickled-{name}"
        folder.mkdir()
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch pickled'\ntR.")
        by_file = refused(server, body(folder / name, "parquet"), 422, "pickled_weights")
        by_folder = refused(server, body(folder, "parquet"), 422, "pickled_weights")
        assert "save_file" in by_file["detail"]
        assert "save_file" in by_folder["detail"]
    assert not Path("pickled").exists()


def test_a_quantized_model_is_not_quantized_again(server: Server, new_model: NewModel) -> None:
    job = server.run(body(new_model(), "compressed-tensors", "parquet"))
    for output in ("compressed-tensors", "parquet"):
        asked = body({"type": "job", "job_id": job["id"], "output": output}, "parquet")
        problem = server.fail(asked)
        assert problem["code"] == "already_quantized"
        assert problem["tensor"].startswith("blocks.")


def test_a_job_as_a_source_has_to_have_written_a_model(server: Server, new_model: NewModel) -> None:
    job = server.run(body(new_model(), "compressed-tensors", "parquet"))
    unknown = {"type": "job", "job_id": "job_00000000-0000-7000-8000-000000000000"}
    problem = refused(server, validation(new_model(), unknown), 404, "model_not_found")
    assert problem["errors"][0]["pointer"] == "/quantized/job_id"
    ambiguous = {"type": "job", "job_id": job["id"]}
    problem = refused(server, validation(new_model(), ambiguous), 422, "invalid_config")
    assert problem["errors"][0]["pointer"] == "/quantized/output"


def test_addresses_that_do_not_exist_are_problems_too(server: Server) -> None:
    missing = "/v1/jobs/job_00000000-0000-7000-8000-000000000000"
    for address in ("/", "/v2/jobs", missing, f"{missing}/events", f"{missing}/report", f"{missing}/artifacts/a/b"):
        response = server.client.get(address)
        assert (response.status_code, response.json()["code"]) == (404, "not_found")
    response = server.client.put("/v1/jobs")
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")


# Models


def damaged(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file put together by hand; `length` is what it claims its header to have."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> Json:
    """A tensor in a header."""
    return {"dtype": dtype, "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


def twice(path: Path) -> Path:
    """A header with the same name two times, which a JSON library would pass over."""
    one = json.dumps(entry(0, 16))
    return damaged(path, f'{{"twin": {one}, "twin": {one}}}'.encode(), bytes(16))


def truncated(path: Path) -> Path:
    """A good file without its last bytes."""
    save(path, {"first.weight": np.ones((64, 64), np.float32), "last.weight": np.ones((64, 64), np.float32)})
    os.truncate(path, path.stat().st_size - 100)
    return path


def swapped_shard(path: Path) -> Path:
    """An index that promises a tensor which its file does not hold."""
    save(path.parent / "model-00001-of-00001.safetensors", {"here.weight": np.ones((64, 64), np.float32)})
    weight_map = dict.fromkeys(("here.weight", "gone.weight"), "model-00001-of-00001.safetensors")
    (path.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path.parent


def outward_index(path: Path) -> Path:
    """An index that names a file outside its folder."""
    save(path.parent.parent / "outside.safetensors", {"w.weight": np.ones((64, 64), np.float32)})
    path.parent.mkdir(exist_ok=True)
    index = path.parent / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w.weight": "../outside.safetensors"}}))
    return path.parent


def twice_in_two_files(path: Path) -> Path:
    """Two files of one model that both hold a tensor of the same name."""
    for name in ("a.safetensors", "b.safetensors"):
        save(path.parent / name, {"shared.weight": np.ones((64, 64), np.float32)})
    return path.parent


DAMAGED: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "empty": (lambda p: _write(p, b""), "corrupt_model", "model.safetensors"),
    "truncated": (truncated, "corrupt_model", "last.weight"),
    "truncated header": (lambda p: damaged(p, b'{"a', length=500), "corrupt_model", "model.safetensors"),
    "no json": (lambda p: damaged(p, b"\x00" * 64), "corrupt_model", "model.safetensors"),
    "a list": (lambda p: damaged(p, []), "corrupt_model", "model.safetensors"),
    "deeply nested": (lambda p: damaged(p, b"[" * 200_000), "corrupt_model", "model.safetensors"),
    "2 GB header": (lambda p: damaged(p, b"{}", length=2 << 30), "corrupt_model", "model.safetensors"),
    "endless header": (lambda p: damaged(p, b"{}", length=2**64 - 1), "corrupt_model", "model.safetensors"),
    "offsets behind the end": (lambda p: damaged(p, {"far": entry(0, 4000)}, bytes(16)), "corrupt_model", "far"),
    "offsets backwards": (
        lambda p: damaged(p, {"back": entry(16, 0, [4])}, bytes(16)), "corrupt_model", "back"),
    "negative offsets": (lambda p: damaged(p, {"minus": entry(-16, 0, [4])}, bytes(16)), "corrupt_model", "minus"),
    "shape against bytes": (lambda p: damaged(p, {"lies": entry(0, 16, [5])}, bytes(16)), "corrupt_model", "lies"),
    "shape beyond all bounds": (
        lambda p: damaged(p, {"vast": entry(0, 16, [2**40, 2**40])}, bytes(16)), "corrupt_model", "vast"),
    "overlap": (
        lambda p: damaged(p, {"a": entry(0, 16), "over": entry(8, 24)}, bytes(24)), "corrupt_model", "over"),
    "hole": (lambda p: damaged(p, {"a": entry(0, 8), "b": entry(16, 24)}, bytes(24)), "corrupt_model", "b"),
    "bytes left over": (lambda p: damaged(p, {"a": entry(0, 8)}, bytes(24)), "corrupt_model", "model.safetensors"),
    "duplicate names": (twice, "corrupt_model", "twin"),
    "unknown dtype": (lambda p: damaged(p, {"odd": entry(0, 16, [4], "F7")}, bytes(16)), "unknown_dtype", "odd"),
    "index against file": (swapped_shard, "corrupt_model", "gone.weight"),
    "index that leads out": (outward_index, "path_forbidden", "w.weight"),
    "one name in two files": (twice_in_two_files, "corrupt_model", "shared.weight"),
}  # fmt: skip


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_model_fails_its_job_with_the_name_of_what_is_damaged(server: Server, place: Path, what: str) -> None:
    build, code, name = DAMAGED[what]
    source = build(place / "model" / "model.safetensors")
    before = files_of(place)
    output = {"format": "parquet", "uri": (place / "target").as_uri()}
    asked = body(source, output, "compressed-tensors")
    job_id = server.submit(asked)["id"]
    job = server.finish(job_id)
    assert job["status"] == "failed"
    problem = job["error"]
    assert problem["code"] == code, problem
    assert name in problem["detail"]
    assert problem.get("tensor") in (name, None)
    assert str(place) not in json.dumps(problem), "a path of the server"
    assert problem["instance"] == f"/v1/jobs/{job_id}"
    assert not server.leftovers(job_id)
    assert files_of(place) == before
    assert server.follow(job_id)[-1]["type"] == "job.failed"
    assert server.client.get(f"/v1/jobs/{job_id}/report").status_code == 409


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "group"])
def test_a_weight_that_is_no_number_fails_the_job_with_the_tensors_name(
    server: Server, new_model: NewModel, weights: Weights, value: float, granularity: str
) -> None:
    tensors = {f"{name}.weight": weights(96, 128) for name in ("good", "sick", "other")}
    tensors["sick.weight"][95, 127] = value
    model = new_model(tensors)
    job_id = server.submit(body(model, "parquet", "compressed-tensors", granularity=granularity))["id"]
    job = server.finish(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "non_finite_weights")
    assert job["error"]["tensor"] == "sick.weight"
    assert not server.leftovers(job_id)
    copied = server.run(body(model, "parquet", granularity=granularity, on_non_finite="copy"))
    schemes = {t["name"]: t["scheme"] for t in server.report(copied["id"])["outputs"][0]["tensors"]}
    assert schemes == {"good.weight": "int4", "sick.weight": "none", "other.weight": "int4"}
    assert any("sick.weight" in text for text in copied["result"]["warnings"])


@pytest.mark.parametrize("change", ["removed", "replaced", "cut short", "written to"])
def test_a_source_that_changes_while_it_is_read_fails_the_job(
    start_server: StartServer, place: Path, weights: Weights, change: str
) -> None:
    server = start_server(max_running_jobs=1, threads=1, block_bytes=1 << 16)
    tensors = {f"l.{i:02}.weight": weights(128, 512) for i in range(40)}
    folder = save_folder(place / "model", tensors)
    job_id = server.submit(body(folder, "parquet", "compressed-tensors", backend="reference"))["id"]
    server.wait_for(job_id, "tensor.completed", count=2)
    file = folder / "model.safetensors"
    if change == "removed":
        shutil.rmtree(folder)
    elif change == "replaced":
        save(place / "new" / "model.safetensors", tensors)
        (place / "new" / "model.safetensors").replace(file)
    elif change == "cut short":
        os.truncate(file, file.stat().st_size // 2)
    else:
        with file.open("r+b") as written:
            written.seek(-8, os.SEEK_END)
            written.write(b"\0" * 8)
    job = server.finish(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "source_changed"), job
    assert "model.safetensors" in job["error"]["detail"]
    assert not server.leftovers(job_id)
    assert server.client.get("/readyz").status_code == 200


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 24 MiB, under the model root."""
    folder = place / "small-disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here: that takes root and CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("format_", ["compressed-tensors", "parquet"])
def test_a_full_disk_fails_the_job_and_is_empty_again(
    start_server: StartServer, small_disk: Path, place: Path, weights: Weights, format_: str
) -> None:
    server = start_server(data_dir=small_disk / "data", block_bytes=1 << 20)
    tensors = {f"l.{i:02}.weight": weights(512, 1024) for i in range(16)}  # 32 MiB
    folder = save_folder(place / "large", tensors)
    small = save_folder(place / "small", {"l.weight": weights(512, 1024)})
    asked = body(folder, format_, skip=["*"])
    job_id = server.submit(asked)["id"]
    job = server.finish(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "disk_full"), job
    assert not server.leftovers(job_id)
    assert shutil.disk_usage(small_disk).free > 16 << 20
    assert server.run(body(small, format_, skip=["*"]))["status"] == "succeeded"


def test_a_full_disk_at_the_address_of_an_output_leaves_nothing_there(
    start_server: StartServer, small_disk: Path, place: Path, weights: Weights
) -> None:
    folder = save_folder(place / "large", {f"l.{i:02}.weight": weights(512, 1024) for i in range(16)})
    server = start_server(block_bytes=1 << 20)
    output = {"format": "parquet", "uri": (small_disk / "target").as_uri()}
    job_id = server.submit(body(folder, output, skip=["*"]))["id"]
    job = server.finish(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "disk_full"), job
    assert not list(small_disk.iterdir())
    assert not server.leftovers(job_id)
