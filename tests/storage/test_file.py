"""Which paths a request may name, and that all others get one answer."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from service.errors import (
    DiskFull,
    ForbiddenPath,
    InvalidConfig,
    ModelNotFound,
    StorageFailure,
    TargetInUse,
    UnsupportedModel,
)
from service.storage.faults import storage_faults
from service.storage.file import check_links, locate_target, resolve_model, resolve_target


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    (path / "minilm").mkdir(parents=True)
    (path / "minilm" / "model.safetensors").write_bytes(b"x")
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.mkdir()
    (path / "passwd").write_bytes(b"x")
    return path


def refusal(uri: str, root: Path) -> str:
    with pytest.raises(ForbiddenPath) as caught:
        resolve_model(uri, [root])
    return caught.value.detail


@pytest.mark.parametrize(
    "form",
    ["file://{}", "file://localhost{}", "FILE://{}", "file:{}", "file:////{}", "file://{}/"],
)
def test_every_way_to_write_an_address_names_the_same_folder(root: Path, form: str) -> None:
    assert resolve_model(form.format(root / "minilm"), [root]) == root / "minilm"


def test_names_are_percent_decoded_once(root: Path) -> None:
    (root / "a b%41.safetensors").write_bytes(b"x")
    assert resolve_model(f"file://{root}/a%20b%2541.safetensors", [root]).name == "a b%41.safetensors"
    assert resolve_model((root / "a b%41.safetensors").as_uri(), [root]).name == "a b%41.safetensors"


def test_a_name_that_is_not_utf8_is_found(root: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.safetensors"))
    path.write_bytes(b"x")
    assert resolve_model(f"file://{root}/caf%E9.safetensors", [root]) == path


def test_what_lies_outside_is_refused_in_the_same_words_whether_it_is_there_or_not(root: Path, outside: Path) -> None:
    (root / "link").symlink_to(outside)
    (root / "dangling").symlink_to(outside / "nothing")
    (root / "hop").symlink_to("link")
    addresses = [
        f"file://{outside}/passwd",
        f"file://{outside}/nothing",
        f"file://{outside}",
        "file:///",
        "file:///dev/zero",
        "file:///proc/self/environ",
        f"file://{root}-next/model",
        f"file://{root}/../secret/passwd",
        f"file://{root}/../secret/nothing",
        f"file://{root}/%2e%2e/secret/passwd",
        f"file://{root}/..%2fsecret%2fpasswd",
        f"file://{root}/minilm/../minilm",
        f"file://{root}/link/passwd",
        f"file://{root}/link/nothing",
        f"file://{root}/link",
        f"file://{root}/hop/passwd",
        f"file://{root}/dangling",
        f"file://{root}/minilm%00.safetensors",
        f"file://{outside}/{'x' * 300}",
    ]
    assert len({refusal(uri, root) for uri in addresses}) == 1


def test_nothing_is_allowed_without_roots(root: Path) -> None:
    with pytest.raises(ForbiddenPath):
        resolve_model((root / "minilm").as_uri(), [])


def test_the_refusal_names_no_path_of_the_server(root: Path, outside: Path) -> None:
    assert str(outside.parent) not in refusal(f"file://{outside}/passwd", root)


@pytest.mark.parametrize("name", ["missing", "missing/deeper", "x" * 300, "minilm/model.safetensors/below", "loop"])
def test_what_is_missing_under_a_root_is_not_found(root: Path, name: str) -> None:
    (root / "loop").symlink_to("loop")
    with pytest.raises(ModelNotFound):
        resolve_model(f"file://{root}/{name}", [root])


def test_links_that_stay_under_the_roots_are_followed(root: Path, tmp_path: Path) -> None:
    # As in a hub cache: names in a snapshot are links to content elsewhere.
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_bytes(b"x")
    (root / "snapshot").mkdir()
    (root / "snapshot" / "model.safetensors").symlink_to(blobs / "abc")
    with pytest.raises(ForbiddenPath):
        resolve_model((root / "snapshot").as_uri(), [root])
    assert resolve_model((root / "snapshot").as_uri(), [root, blobs]) == root / "snapshot"
    assert resolve_model(f"file://{root}/snapshot/model.safetensors", [root, blobs]) == blobs / "abc"


def test_a_root_may_itself_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert resolve_model(f"file://{tmp_path}/alias/minilm", [tmp_path / "alias"]) == root / "minilm"


@pytest.mark.parametrize("depth", ["", "deep/deeper"])
def test_a_link_in_a_model_that_leaves_the_roots_is_named_and_not_whether_it_leads_anywhere(
    root: Path, outside: Path, depth: str
) -> None:
    folder = root / "minilm" / depth
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "tokenizer.json"
    details = set()
    for target in ("passwd", "nothing", "."):
        link.symlink_to(outside / target)
        details.add(refusal((root / "minilm").as_uri(), root))
        with pytest.raises(ForbiddenPath) as caught:
            check_links([folder / "model.safetensors", link], [root])
        details.add(caught.value.detail)
        link.unlink()
    assert len(details) == 1
    detail = details.pop()
    assert "'tokenizer.json' in the model is a link that leads outside" in detail
    assert str(root.parent) not in detail


def test_a_link_to_a_folder_with_a_bad_link_in_it_is_forbidden_as_well(root: Path, outside: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "leak").symlink_to(outside / "passwd")
    (root / "minilm" / "extra").symlink_to(root / "elsewhere")
    assert "'leak'" in refusal((root / "minilm").as_uri(), root)


def test_files_and_links_under_the_roots_are_not_complained_of(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    (root / "link").symlink_to(root / "minilm" / "model.safetensors")
    check_links([root / "link", root / "minilm" / "model.safetensors", root / "missing"], [tmp_path / "alias"])


def test_a_folder_that_links_to_itself_is_walked_once(root: Path) -> None:
    (root / "minilm" / "again").symlink_to(root / "minilm")
    (root / "minilm" / "ring").symlink_to("ring")
    assert resolve_model((root / "minilm").as_uri(), [root]) == root / "minilm"


def test_a_pipe_is_refused_without_waiting_for_its_other_end(root: Path) -> None:
    os.mkfifo(root / "pipe.safetensors")
    os.mkfifo(root / "minilm" / "pipe")
    for name in ("pipe.safetensors", "minilm"):
        with pytest.raises(UnsupportedModel, match="neither a file nor a folder"):
            resolve_model((root / name).as_uri(), [root])


def test_a_socket_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(UnsupportedModel):
            resolve_model((root / "socket").as_uri(), [root])


def test_a_device_is_refused_even_under_a_root() -> None:
    with pytest.raises(UnsupportedModel):
        resolve_model("file:///dev/zero", [Path("/dev")])


@pytest.mark.parametrize(
    "uri",
    [
        "models/minilm",
        "/models/minilm",
        "",
        "file:",
        "file://",
        "file:minilm",
        "file://host/models",
        "file://host:80/models",
        "file://user@localhost/models",
        "file:///models/minilm?a=b",
        "file:///models/minilm#part",
        "http://127.0.0.1/model",
    ],
)
def test_what_is_no_file_address_is_invalid(root: Path, uri: str) -> None:
    with pytest.raises(InvalidConfig):
        resolve_model(uri, [root])


@pytest.mark.parametrize("uri", ["s3://bucket/model", "hf://owner/name@main", "gs://b/m"])
def test_an_address_elsewhere_is_refused_and_sent_to_a_server(root: Path, uri: str) -> None:
    for resolve in (resolve_model, resolve_target):
        with pytest.raises(InvalidConfig, match=r"not on this machine.*--server"):
            resolve(uri, [root])


@pytest.mark.parametrize("uri", ["data:,x", "ftp://host/model"])
def test_another_scheme_is_refused_with_those_that_are_supported(root: Path, uri: str) -> None:
    for resolve in (resolve_model, resolve_target):
        with pytest.raises(InvalidConfig, match=r"file://.*s3://"):
            resolve(uri, [root])


def test_a_target_is_a_new_or_empty_folder_whose_parent_is_there(root: Path) -> None:
    assert resolve_target(f"file://{root}/new", [root]) == root / "new"
    (root / "empty").mkdir()
    assert resolve_target(f"file://{root}/empty/", [root]) == root / "empty"
    (root / "alias").symlink_to(root / "empty")
    assert resolve_target(f"file://{root}/alias/new", [root]) == root / "empty" / "new"


def test_a_target_that_is_taken_is_in_use_but_can_be_located(root: Path) -> None:
    (root / "file").write_bytes(b"x")
    (root / "alias").symlink_to(root / "minilm")
    for name in ("minilm", "file", "alias"):
        with pytest.raises(TargetInUse):
            resolve_target(f"file://{root}/{name}", [root])
    assert locate_target(f"file://{root}/minilm", [root]) == root / "minilm"


def test_a_target_outside_is_refused_in_the_same_words_whether_it_is_there_or_not(root: Path, outside: Path) -> None:
    (root / "link").symlink_to(outside)
    (root / "dangling").symlink_to(outside / "nothing")
    details = set()
    for uri in (
        f"file://{outside}/new",
        f"file://{outside}/passwd",
        f"file://{outside}/nothing/new",
        f"file://{root}/link/new",
        f"file://{root}/link",
        f"file://{root}/dangling",
        f"file://{root}/../secret/new",
        f"file://{root}",
        "file:///",
    ):
        with pytest.raises(ForbiddenPath) as caught:
            resolve_target(uri, [root])
        details.add(caught.value.detail)
    assert len(details) == 1


def test_a_target_without_a_parent_or_with_a_name_too_long_is_invalid(root: Path) -> None:
    for name in ("missing/new", "minilm/model.safetensors/new", "x" * 200):
        with pytest.raises(InvalidConfig):
            resolve_target(f"file://{root}/{name}", [root])


def test_a_fault_of_the_system_is_told_without_the_path(tmp_path: Path) -> None:
    with pytest.raises(StorageFailure) as caught, storage_faults("reading the model"):
        (tmp_path / "missing").read_bytes()
    assert "reading the model" in caught.value.detail
    assert str(tmp_path) not in caught.value.detail


def test_a_full_disk_is_told_apart_from_other_faults() -> None:
    with pytest.raises(DiskFull), storage_faults("writing"), Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"x")
