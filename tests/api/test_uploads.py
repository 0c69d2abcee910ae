"""Uploads over real HTTP: whole, in pieces, cut anywhere, and by several clients at once."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from bench.small_disk import may_mount
from service.jobs.api_keys import Scope
from tests.api.conftest import save_model
from tests.api.keyed import Keyed
from tests.api.test_problems import problem_of
from tests.conftest import StartServer
from tests.jobs.test_restart import REPOSITORY
from tests.server import Json, Server, body, validation

WAIT_S = 30.0
#: What the HTTP server may hold and drop when a connection goes: its own buffer, and one read of a socket.
IN_FLIGHT = (64 + 256) << 10


def address(digest: str) -> str:
    """Where a blob is."""
    return f"/v1/blobs/sha256:{digest}"


def sha256(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def put(server: Server, data: bytes, start: int = 0, total: int | None = None, digest: str = "") -> httpx.Response:
    """Bytes from `start` on; with `total` as a piece."""
    headers = {} if total is None else {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{total}"}
    return server.client.put(address(digest or sha256(data)), content=data, headers=headers)


def offset(server: Server, digest: str) -> int:
    """How far an upload is."""
    response = server.client.head(address(digest))
    assert response.status_code == 404
    return int(response.headers["upload-offset"])


def send_and_cut(server: Server, digest: str, data: bytes, start: int, stop: int) -> None:
    """Announce everything from `start` on, send up to `stop`, and hang up."""
    head = (
        f"PUT {address(digest)} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data) - start}\r\n"
        f"Content-Range: bytes {start}-{len(data) - 1}/{len(data)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.client.base_url.port or 0)) as connection:
        connection.sendall(head.encode() + data[start:stop])


def wait_for_offset(server: Server, digest: str, expected: int) -> None:
    """Wait until so many bytes are stored."""
    deadline = time.monotonic() + WAIT_S
    while (now := offset(server, digest)) < expected:
        assert time.monotonic() < deadline, f"{now} of {expected} bytes\n{server.log_end}"
        time.sleep(0.01)


def wait_until_free(server: Server, digest: str, total: int) -> None:
    """Wait until the call that was cut has ended."""
    deadline = time.monotonic() + WAIT_S
    asking = {"Content-Range": f"bytes */{total}"}
    while (response := server.client.put(address(digest), headers=asking)).status_code != 202:
        assert response.json()["code"] == "upload_in_progress"
        assert response.headers["retry-after"] == "1"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def resume(server: Server, digest: str, data: bytes) -> httpx.Response:
    """Send the rest."""
    wait_until_free(server, digest, len(data))
    start = offset(server, digest)
    return put(server, data[start:], start, len(data), digest)


def blob_files(server: Server) -> list[Path]:
    """All that is stored of blobs, whole or in parts."""
    return sorted(path for path in (server.data_dir / "blobs").rglob("*") if path.is_file())


def upload_folder(server: Server, folder: Path) -> Json:
    """Every file of a folder; the source that names them."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for data in files.values():
        assert put(server, data).status_code in (200, 201)
    return {"type": "blobs", "files": {name: f"sha256:{sha256(data)}" for name, data in files.items()}}


def test_a_whole_upload_is_there_afterwards(server: Server, rng: np.random.Generator) -> None:
    data = rng.bytes(3_000_000)
    assert offset(server, sha256(data)) == 0
    created = put(server, data)
    assert (created.status_code, created.headers["upload-offset"]) == (201, "3000000")
    there = server.client.head(address(sha256(data)))
    assert (there.status_code, there.headers["content-length"]) == (200, "3000000")
    assert put(server, data).status_code == 200, "it is there already"
    assert (server.data_dir / "blobs" / "sha256" / sha256(data)[:2] / sha256(data)).read_bytes() == data


def test_an_empty_file_is_a_blob_as_well(server: Server) -> None:
    assert put(server, b"").status_code in (200, 201)
    assert server.client.head(address(sha256(b""))).headers["content-length"] == "0"


def test_pieces_make_a_blob(server: Server, rng: np.random.Generator) -> None:
    data = rng.bytes(100_000)
    digest = sha256(data)
    for start in range(0, 90_000, 30_000):
        piece = put(server, data[start : start + 30_000], start, len(data), digest)
        assert (piece.status_code, piece.headers["upload-offset"]) == (202, str(start + 30_000))
    assert put(server, data[90_000:], 90_000, len(data), digest).status_code == 201
    assert server.client.head(address(digest)).status_code == 200


def test_a_piece_elsewhere_is_told_where_to_go_on(server: Server, rng: np.random.Generator) -> None:
    data = rng.bytes(10_000)
    digest = sha256(data)
    put(server, data[:4000], 0, len(data), digest)
    for start in (0, 3999, 4001):
        refused = put(server, data[start:], start, len(data), digest)
        assert refused.status_code == 409
        assert refused.json()["code"] == "upload_offset_mismatch"
        assert refused.headers["upload-offset"] == "4000"
    assert put(server, data[4000:], 4000, len(data), digest).status_code == 201


def test_a_body_cut_at_random_bytes_keeps_what_came(server: Server, rng: np.random.Generator) -> None:
    data = rng.bytes(9_000_000)
    digest = sha256(data)
    start = 0
    for segment in range(1, 6):
        stop = segment * 1_500_000 + int(rng.integers(0, 750_000))
        send_and_cut(server, digest, data, start, stop)
        wait_for_offset(server, digest, stop - IN_FLIGHT)
        wait_until_free(server, digest, len(data))
        start = offset(server, digest)
        assert stop - IN_FLIGHT <= start <= stop
    assert resume(server, digest, data).status_code == 201
    assert server.client.head(address(digest)).headers["content-length"] == str(len(data))


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_an_upload_goes_on_after_a_restart(start_server: StartServer, rng: np.random.Generator, end: str) -> None:
    data = rng.bytes(20_000_000)
    digest = sha256(data)
    server = start_server()
    head = (
        f"PUT {address(digest)} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        f"Content-Range: bytes 0-{len(data) - 1}/{len(data)}\r\n\r\n"
    )
    stop = int(rng.integers(5_000_000, 15_000_000))
    with socket.create_connection(("127.0.0.1", server.client.base_url.port or 0)) as connection:
        connection.sendall(head.encode() + data[:stop])
        wait_for_offset(server, digest, 4_000_000)
        getattr(server, end)()
    server = start_server(data_dir=server.data_dir)
    kept = offset(server, digest)
    assert 4_000_000 <= kept <= stop
    assert resume(server, digest, data).status_code == 201
    (only,) = blob_files(server)
    assert only.read_bytes() == data


def test_a_wrong_digest_leaves_nothing(start_server: StartServer, rng: np.random.Generator) -> None:
    server = start_server()
    wrong = sha256(b"something else")
    refused = put(server, rng.bytes(100_000), digest=wrong)
    assert refused.status_code == 400
    assert refused.json()["code"] == "digest_mismatch"
    assert offset(server, wrong) == 0
    put(server, bytes(500), 0, 1000, wrong)
    assert put(server, bytes(500), 500, 1000, wrong).json()["code"] == "digest_mismatch"
    assert blob_files(server) == []


def test_many_clients_at_once_make_one_blob(start_server: StartServer, rng: np.random.Generator) -> None:
    server = start_server()
    data = rng.bytes(5_000_000)
    digest = sha256(data)

    def send(_: int) -> set[int]:
        statuses = set()
        with httpx.Client(base_url=server.base_url, timeout=60) as client:
            while not statuses & {200, 201}:
                statuses.add(client.put(address(digest), content=data).status_code)
        return statuses

    with ThreadPoolExecutor(8) as pool:
        statuses = set().union(*pool.map(send, range(8)))
    assert statuses <= {200, 201, 409}
    assert 201 in statuses
    (only,) = blob_files(server)
    assert only.read_bytes() == data


def test_a_gigabyte_goes_through_in_constant_memory(start_server: StartServer) -> None:
    server = start_server()
    chunk, count = bytes(range(256)) * 4096, 1024
    running = hashlib.sha256()
    for _ in range(count):
        running.update(chunk)
    highest = before = server.anonymous_bytes()

    def chunks() -> Iterator[bytes]:
        nonlocal highest
        for index in range(count):
            if index % 32 == 0:
                highest = max(highest, server.anonymous_bytes())
            yield chunk

    headers = {"Content-Length": str(len(chunk) * count)}
    response = server.client.put(address(running.hexdigest()), content=chunks(), headers=headers)
    assert response.status_code == 201
    highest = max(highest, server.anonymous_bytes())
    print(f"anonymous memory: {before >> 20} MiB before, at most {highest >> 20} MiB")
    assert highest - before < 48 << 20


def test_what_is_too_much_is_refused_before_it_comes(start_server: StartServer) -> None:
    server = start_server(max_blob_bytes=1_000_000, max_stored_bytes=1_500_000)
    too_large = put(server, bytes(1_000_001))
    assert (too_large.status_code, too_large.json()["code"]) == (413, "body_too_large")
    in_pieces = put(server, bytes(10), 0, 1_000_001, "0" * 64)
    assert (in_pieces.status_code, in_pieces.json()["code"]) == (413, "blob_too_large")
    assert put(server, bytes(1_000_000)).status_code == 201, "the limit on other bodies does not hold here"
    beyond = put(server, bytes(600_000))
    assert (beyond.status_code, beyond.json()["code"]) == (429, "storage_quota_exceeded")
    assert len(blob_files(server)) == 1


def test_a_body_that_stands_still_is_ended_and_kept(start_server: StartServer, rng: np.random.Generator) -> None:
    server = start_server(upload_idle_s=0.5)
    data = rng.bytes(10_000)
    head = f"PUT {address(sha256(data))} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.client.base_url.port or 0)) as connection:
        connection.sendall(head.encode() + data[:7000])
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"upload-offset: 7000" in answer.lower()
    assert resume(server, sha256(data), data).status_code == 201


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Range": "bytes 0-1/10"}, 422),
        ({"Content-Range": "bytes 2-0/10"}, 422),
        ({"Content-Range": "bytes 0-2/3, 4-5/6"}, 422),
        ({"Content-Range": "bytes 0-2/2"}, 422),
        ({"Content-Range": "bytes */3"}, 422),
        ({"Content-Range": "lines 0-2/3"}, 422),
        ({"Transfer-Encoding": "chunked"}, 411),
    ],
)
def test_a_body_that_contradicts_its_headers_is_refused(server: Server, headers: dict[str, str], status: int) -> None:
    content = iter([b"abc"]) if "Transfer-Encoding" in headers else b"abc"
    refused = server.client.put(address("e" * 64), content=content, headers=headers)
    assert refused.status_code == status, refused.text
    assert refused.headers["content-type"] == "application/problem+json"
    assert offset(server, "e" * 64) == 0


def test_a_large_body_that_is_not_needed_gets_its_answer(server: Server, rng: np.random.Generator) -> None:
    data = rng.bytes(30_000_000)
    assert put(server, data).status_code == 201
    assert put(server, data).status_code == 200
    refused = put(server, data[5:], 5, len(data), "f" * 64)
    assert (refused.status_code, refused.headers["upload-offset"]) == (409, "0")


def test_a_parameter_that_a_call_does_not_have_is_refused(server: Server, rng: np.random.Generator) -> None:
    data = rng.bytes(1000)
    assert server.client.head(address(sha256(data)), params={"size": "5"}).status_code == 422
    response = server.client.put(address(sha256(data)), content=data, params={"size": "5"})
    assert problem_of(response, 422, "invalid_request")["errors"][0]["parameter"] == "size"
    assert offset(server, sha256(data)) == 0


def test_other_methods_are_told_which_there_are(server: Server) -> None:
    refused = server.client.get(address("0" * 64))
    assert refused.status_code == 405
    assert refused.headers["allow"] == "HEAD, PUT"
    assert server.client.head("/v1/blobs/sha256:XYZ").status_code == 422


def test_a_job_from_blobs_writes_the_same_bytes_as_one_from_the_disk(server: Server, model: Path) -> None:
    source = upload_folder(server, model)
    outputs = ("compressed-tensors", "parquet")
    from_blobs = server.run(body(source, *outputs))
    assert server.files(from_blobs["id"]) == server.files(server.run(body(model, *outputs))["id"])
    assert from_blobs["request"]["source"] == source
    assert not list((server.data_dir / "work").iterdir())
    compared = server.run(validation(source, {"type": "job", "job_id": from_blobs["id"], "output": "parquet"}))
    assert compared["result"]["passed"]
    planned = server.client.post("/v1/plans", json=body(source, *outputs))
    assert planned.status_code == 200, planned.text
    assert planned.json() == server.client.post("/v1/plans", json=body(model, *outputs)).json()


def test_a_blob_that_is_not_there_is_named(server: Server, model: Path) -> None:
    source = upload_folder(server, model)
    source["files"]["sub/more.json"] = "sha256:" + "d" * 64
    for path in ("/v1/jobs", "/v1/plans"):
        refused = server.client.post(path, json=body(source, "parquet"))
        assert refused.status_code == 404
        assert refused.json()["code"] == "blob_not_found"
        assert refused.json()["errors"][0]["pointer"] == "/source/files/sub~1more.json"
    assert not list((server.data_dir / "work").iterdir())


@pytest.mark.parametrize(
    ("files", "pointer"),
    [
        ({"../model.safetensors": "sha256:" + "0" * 64}, "/source/files/..~1model.safetensors"),
        ({"model.safetensors": "0" * 64}, "/source/files/model.safetensors"),
        ({"model.safetensors": "sha256:" + "A" * 64}, "/source/files/model.safetensors"),
        ({"a": "sha256:" + "0" * 64, "A": "sha256:" + "0" * 64}, "/source/files"),
        ({}, "/source/files"),
    ],
)
def test_a_source_of_blobs_with_bad_names_is_refused(server: Server, files: Json, pointer: str) -> None:
    refused = server.client.post("/v1/jobs", json=body({"type": "blobs", "files": files}, "parquet"))
    assert refused.status_code == 422, refused.text
    assert [field["pointer"] for field in refused.json()["errors"]] == [pointer]


def test_a_job_from_blobs_goes_on_after_a_kill(start_server: StartServer, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", layers=12, rows=256, cols=512)
    server = start_server(backend="reference", method="mse")
    source = upload_folder(server, model)
    job = server.submit(body(source, "parquet"))
    server.wait_for(job["id"], "tensor.completed", 2)
    assert server.job(job["id"])["status"] == "running"
    server.kill()
    server = start_server(data_dir=server.data_dir, backend="reference", method="mse")
    assert server.finish(job["id"])["status"] == "succeeded"
    assert "job.resumed" in [event["type"] for event in server.follow(job["id"])]
    undisturbed = server.run(body(source, "parquet"))
    assert server.files(job["id"]) == server.files(undisturbed["id"])


def test_blobs_expire_unless_a_job_that_has_not_ended_uses_them(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(blob_ttl_s=0.5, max_running_jobs=1, backend="reference", method="mse")
    unused = sha256(b"unused")
    assert put(server, b"unused").status_code == 201
    slow = save_model(tmp_path / "slow", layers=6, rows=512, cols=512)
    running = server.submit(body(upload_folder(server, slow), "parquet"))
    waiting_for = save_model(tmp_path / "next", layers=1, seed=1)
    waiting = server.submit(body(upload_folder(server, waiting_for), "parquet"))
    files = server.data_dir / "blobs" / "sha256"
    deadline = time.monotonic() + WAIT_S
    while (files / unused[:2] / unused).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for job in (running, waiting):
        assert server.finish(job["id"])["status"] == "succeeded"
    while blob_files(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.client.head(address(unused)).status_code == 404


FULL_DISK = """
import hashlib, sys
from pathlib import Path
from tests.server import Server
disk, data = Path(sys.argv[1]), bytes(range(256)) * 4 * 8192
server = Server(disk / "data", [disk], log_path=Path(sys.argv[2])).start()
(disk / "filler").write_bytes(bytes(12 << 20))
address = "/v1/blobs/sha256:" + hashlib.sha256(data).hexdigest()
full = server.client.put(address, content=data)
offset = int(full.headers["upload-offset"])
assert 0 < offset < len(data), offset
assert server.client.get("/healthz").status_code == 200
(disk / "filler").unlink()
assert server.client.head(address).headers["upload-offset"] == str(offset)
rest = {"Content-Range": f"bytes {offset}-{len(data) - 1}/{len(data)}"}
done = server.client.put(address, content=data[offset:], headers=rest)
print(full.status_code, full.json()["code"], done.status_code)
server.stop()
"""


@pytest.mark.skipif(not may_mount(), reason="needs a mount namespace to make a small disk in")
def test_a_full_disk_is_told_and_what_has_come_is_kept(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    small_disk = 'mount -t tmpfs -o size=16m none "$0" && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", small_disk, str(disk)]
    program = [sys.executable, "-c", FULL_DISK, str(disk), str(tmp_path / "log")]
    done = subprocess.run([*command, *program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["507", "disk_full", "201"]


def test_a_tenant_learns_nothing_of_what_another_has_sent(keyed: Keyed, model: Path) -> None:
    ada, bob = keyed.client("uploads-ada"), keyed.client("uploads-bob")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    source = {"type": "blobs", "files": {name: f"sha256:{sha256(data)}" for name, data in files.items()}}
    for client in (ada, bob):
        for data in files.values():
            assert client.head(address(sha256(data))).headers["upload-offset"] == "0"
            refused = client.post("/v1/jobs", json=body(source, "parquet"))
            assert (refused.status_code, refused.json()["code"]) == (404, "blob_not_found")
            half = {"Content-Range": f"bytes 0-{len(data) // 2 - 1}/{len(data)}"}
            assert client.put(address(sha256(data)), content=data[: len(data) // 2], headers=half).status_code == 202
            assert client.head(address(sha256(data))).headers["upload-offset"] == str(len(data) // 2)
            assert client.put(address(sha256(data)), content=data).status_code == 201
        client.run(body(source, "parquet"))
    folder = keyed.server.data_dir / "blobs" / "sha256"
    for data in files.values():
        assert len(list(folder.rglob(sha256(data)))) == 1
    admin = keyed.client("uploads-admin", Scope.ADMIN)
    assert admin.head(address(sha256(data))).status_code == 404, "a blob is nobody's but those who sent it"
