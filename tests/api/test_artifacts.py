"""Artifacts: listed, downloaded whole and in ranges, and as one tar."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.archive import archive, archive_bytes
from service.api.ranges import Unsatisfiable, parse_range
from service.jobs.contents import Contents
from service.jobs.job import Artifact
from service.storage.store_options import StoreOptions
from service.storage.stores import Stores
from tests.api.test_jobs import large_model
from tests.conftest import StartServer
from tests.server import Server, body, wait_until

WEIGHTS = "compressed-tensors/model.safetensors"


@pytest.fixture
def address(finished: dict[str, Any]) -> str:
    """Where the weights are."""
    return f"{finished['links']['artifacts']}/{WEIGHTS}"


def test_every_file_is_listed_and_arrives_as_announced(server: Server, finished: dict[str, Any]) -> None:
    files = server.files(finished["id"])
    assert WEIGHTS in files
    assert {path.split("/")[0] for path in files} == {"compressed-tensors", "parquet"}
    assert list(files) == sorted(files)


def test_lists_come_in_pages(server: Server, finished: dict[str, Any]) -> None:
    seen: list[str] = []
    parameters: dict[str, Any] = {"limit": 2}
    while True:
        page = server.client.get(finished["links"]["artifacts"], params=parameters).json()
        seen += [a["path"] for a in page["data"]]
        if "next_cursor" not in page:
            break
        parameters["after"] = page["next_cursor"]
    assert seen == [a["path"] for a in server.artifacts(finished["id"])]
    wrong = server.client.get(finished["links"]["artifacts"], params={"after": "garbage"})
    assert (wrong.status_code, wrong.json()["errors"][0]["parameter"]) == (422, "after")


def test_the_entity_tag_is_the_hash(server: Server, address: str) -> None:
    response = server.client.get(address)
    etag = f'"{hashlib.sha256(response.content).hexdigest()}"'
    assert response.headers["etag"] == etag
    assert response.headers["content-disposition"] == "attachment; filename*=utf-8''model.safetensors"
    again = server.client.get(address, headers={"If-None-Match": etag})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("bytes=0-9", 0, 10), ("bytes=100-", 100, None), ("bytes=-7", -7, None), ("bytes=5-99999999999", 5, None)],
)
def test_a_range_is_part_of_the_file(server: Server, address: str, asked: str, start: int, stop: int | None) -> None:
    whole = server.client.get(address).content
    response = server.client.get(address, headers={"Range": asked})
    part = whole[start:stop]
    first = start % len(whole)
    assert response.status_code == 206
    assert response.content == part
    assert response.headers["content-range"] == f"bytes {first}-{first + len(part) - 1}/{len(whole)}"


def test_a_range_behind_the_end_says_how_long_the_file_is(server: Server, address: str) -> None:
    size = server.client.head(address).headers["content-length"]
    response = server.client.get(address, headers={"Range": f"bytes={size}-"})
    assert (response.status_code, response.json()["code"]) == (416, "range_not_satisfiable")
    assert response.headers["content-range"] == f"bytes */{size}"


@pytest.mark.parametrize("asked", ["bytes=9-1", "bytes=-", "lines=1-2", "bytes=0-1,4-5", "bytes=a-b"])
def test_a_range_that_cannot_be_understood_is_ignored(server: Server, address: str, asked: str) -> None:
    response = server.client.get(address, headers={"Range": asked})
    assert response.status_code == 200


def test_a_range_of_another_version_is_not_sent(server: Server, address: str) -> None:
    etag = server.client.head(address).headers["etag"]
    ranged = {"Range": "bytes=0-3"}
    assert server.client.get(address, headers=ranged | {"If-Range": '"other"'}).status_code == 200
    assert server.client.get(address, headers=ranged | {"If-Range": f"W/{etag}"}).status_code == 200
    assert server.client.get(address, headers=ranged | {"If-Range": etag}).status_code == 206


@pytest.mark.parametrize(
    "path",
    ["../../arrowquant.sqlite3", "%2e%2e/%2e%2e/arrowquant.sqlite3", "/etc/passwd", "%2Fetc%2Fpasswd", "report.json"],
)
def test_only_listed_files_are_served(server: Server, finished: dict[str, Any], path: str) -> None:
    response = server.client.get(f"{finished['links']['artifacts']}/{path}")
    assert response.status_code == 404
    assert str(server.data_dir) not in response.text


def test_the_archive_holds_every_file_and_is_always_the_same(server: Server, finished: dict[str, Any]) -> None:
    first, second = (server.client.get(finished["links"]["archive"]) for _ in range(2))
    assert first.content == second.content
    assert first.headers["content-type"] == "application/x-tar"
    assert int(first.headers["content-length"]) == len(first.content)
    with tarfile.open(fileobj=io.BytesIO(first.content)) as tar:
        held = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
    assert held == server.files(finished["id"])
    again = server.client.get(finished["links"]["archive"], headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304


def test_a_file_that_was_removed_elsewhere_is_404(server: Server, model: Any, model_root: Any) -> None:
    target = model_root / "removed"
    job = server.run(body(model, {"format": "parquet", "uri": target.as_uri()}))
    path = server.artifacts(job["id"])[0]["path"]
    (target / path.removeprefix("parquet/")).unlink()
    assert server.client.get(f"{job['links']['artifacts']}/{path}").status_code == 404
    assert server.client.get(job["links"]["archive"]).status_code == 404


def test_a_purge_in_the_middle_of_a_download_waits_with_the_files(start_server: StartServer, model_root: Path) -> None:
    server = start_server()
    job = server.run(body(large_model(model_root), "parquet", "compressed-tensors", bit_width=8, method="minmax"))
    whole = server.client.get(job["links"]["archive"]).content
    with httpx.stream("GET", f"{server.base_url}{job['links']['archive']}", timeout=90) as response:
        arriving = response.iter_raw(1 << 16)
        came = next(arriving)
        assert server.client.delete(job["links"]["self"], params={"purge": "true"}).status_code == 204
        assert server.client.get(job["links"]["self"]).status_code == 404, "the record goes at once"
        assert server.leftovers(job["id"]), "the files are being read"
        assert came + b"".join(arriving) == whole
    wait_until(lambda: not server.leftovers(job["id"]))


def test_a_file_that_is_removed_elsewhere_in_the_middle_of_a_download_cuts_it_off_and_is_no_crash(
    start_server: StartServer, model_root: Path
) -> None:
    server = start_server()
    target = {"format": "parquet", "uri": (model_root / "elsewhere").as_uri()}
    job = server.run(body(large_model(model_root), "compressed-tensors", target, bit_width=8, method="minmax"))
    address = f"{server.base_url}{job['links']['archive']}"
    with httpx.stream("GET", address, timeout=90) as response:
        arriving = response.iter_raw(1 << 16)
        next(arriving)
        shutil.rmtree(model_root / "elsewhere")
        with pytest.raises(httpx.RemoteProtocolError):
            list(arriving)
    assert server.client.get("/healthz").status_code == 200
    assert re.search(r"WARNING .*a download was cut off: .* was removed", server.log), server.log_end
    assert "Traceback" not in server.log


async def test_names_of_any_length_and_script_fit_into_the_archive(tmp_path: Any) -> None:
    names = ["a/" + "n" * 300, "b/größe/重み.bin", "c/empty"]
    artifacts = []
    for index, name in enumerate(names):
        path = tmp_path / str(index)
        path.write_bytes(b"x" * (index - 2) ** 2 * 300)
        artifacts.append(Artifact(name, path.stat().st_size, "0" * 64, "application/octet-stream", str(path)))
    content = b"".join([piece async for piece in archive(Contents(Stores(StoreOptions())), artifacts)])
    assert len(content) == archive_bytes(artifacts)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert [(m.name, m.size) for m in tar.getmembers()] == [(a.path, a.size_bytes) for a in artifacts]


def test_no_byte_of_an_empty_file_can_be_asked_for() -> None:
    assert parse_range(None, 0) is None
    for header in ("bytes=0-", "bytes=-1", "bytes=-0"):
        with pytest.raises(Unsatisfiable):
            parse_range(header, 0)
