"""Ranged reads of stores: few and large, of one version, through faults, and never waiting for ever."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from service.errors import (
    ArrowQuantError,
    Cancelled,
    InvalidConfig,
    ModelNotFound,
    SourceChanged,
    StorageFailure,
    StoreRefused,
    StoreUnavailable,
    TargetInUse,
)
from service.storage.remote_address import parse_address, parse_root
from service.storage.remote_files import PART_BYTES, WINDOW_BYTES, RemoteFiles
from service.storage.store_options import StoreOptions
from service.storage.stores import Stores
from tests.stores import COMMIT, S3, SECRETS, Answer, Call, Hub, Proxy

MIB = 1 << 20
WEIGHTS = PurePosixPath("w.bin")
OTHER_COMMIT = "b" * 40


def make_stores(proxy: Proxy | None = None, hub: Hub | None = None, timeout_s: float = 5.0) -> Stores:
    """What a server with every remote root would use."""
    return Stores(
        StoreOptions(
            roots=tuple(map(parse_root, ("s3://", "hf://", "gs://", "az://"))),
            s3_endpoint=proxy.url if proxy else None,
            s3_region="us-east-1",
            hub_endpoint=hub.url if hub else None,
            allow_http=True,
            timeout_s=timeout_s,
        )
    )


@contextmanager
def opened(stores: Stores, uri: str, cancelled: Callable[[], bool] = lambda: False) -> Iterator[RemoteFiles]:
    """The files at an address."""
    address = stores.address(uri)
    assert address is not None
    with closing(stores.files(address, cancelled)) as files:
        yield files


@pytest.fixture
def weights(s3_server: S3, request: pytest.FixtureRequest) -> tuple[str, bytes]:
    """A file of 40 MiB in a folder of its own, beside a small one: the folder's address, and the bytes."""
    data = os.urandom(40 * MIB + 17)
    prefix = f"folder-{abs(hash(request.node.nodeid))}"
    s3_server.put("models", f"{prefix}/w.bin", data)
    s3_server.put("models", f"{prefix}/config.json", b"{}")
    return f"s3://models/{prefix}", data


def test_large_reads_are_made_in_parts_and_at_once(proxy: Proxy, weights: tuple[str, bytes]) -> None:
    uri, data = weights
    together, most = 0, 0
    lock, several = threading.Lock(), threading.Event()

    def watch(call: Call, answered: Callable[[], Answer]) -> Answer:
        nonlocal together, most
        if not call.range_bytes:
            return answered()
        with lock:
            together += 1
            most = max(most, together)
        if most > 1:
            several.set()
        several.wait(5)  # nobody is answered before a second call has come
        answer = answered()
        with lock:
            together -= 1
        return answer

    proxy.fault = watch
    with opened(make_stores(proxy), uri) as files:
        read = files.open(WEIGHTS).read(3, 40 * MIB)
    assert read.tobytes() == data[3 : 3 + 40 * MIB]
    sizes = [call.range_bytes for call in proxy.calls if call.range_bytes]
    assert sorted(sizes) == [PART_BYTES] * 5
    assert all(call.headers["if-match"] for call in proxy.calls if call.range_bytes)
    assert several.is_set()


def test_small_neighbours_share_one_request(proxy: Proxy, weights: tuple[str, bytes]) -> None:
    uri, data = weights
    with opened(make_stores(proxy), uri) as files:
        file = files.open(WEIGHTS)
        for start in range(0, 2 * WINDOW_BYTES, 100_003):
            count = min(100_003, 2 * WINDOW_BYTES - start)
            assert file.read(start, count).tobytes() == data[start : start + count]
    assert [call.range_bytes for call in proxy.calls if call.range_bytes] == [WINDOW_BYTES] * 2


def test_a_listing_tells_names_sizes_and_folders_and_leaves_out_what_is_no_file_name(
    proxy: Proxy, s3_server: S3
) -> None:
    for name in ("model.safetensors", "sub/deep/a.json", ".hidden", ".git/config", "sub/", "x" * 300, "a%25b é.txt"):
        s3_server.put("models", f"listed/{name}", b"12345")
    with opened(make_stores(proxy), "s3://models/listed") as files:
        listing = files.list()
        assert [str(name) for name in listing.files] == ["a%b é.txt", "model.safetensors", "sub/deep/a.json"]
        assert len(listing.warnings) == 1
        assert files.names_in(PurePosixPath(".")) == ["a%b é.txt", "model.safetensors", "sub"]
        assert files.has_folder(PurePosixPath("sub/deep"))
        assert not files.has(PurePosixPath("sub"))
        assert files.size(PurePosixPath("sub/deep/a.json")) == 5
        assert files.open(PurePosixPath("a%b é.txt")).read(1, 2).tobytes() == b"23"


def test_an_address_of_one_file_finds_its_neighbours_by_name_only(proxy: Proxy, weights: tuple[str, bytes]) -> None:
    with opened(make_stores(proxy), f"{weights[0]}/w.bin") as files:
        assert files.entry == WEIGHTS
        assert files.has(PurePosixPath("config.json"))
        assert not files.has(PurePosixPath("nothing.json"))


def test_a_file_that_is_replaced_between_reads_is_an_error_that_names_it(
    proxy: Proxy, s3_server: S3, weights: tuple[str, bytes]
) -> None:
    with opened(make_stores(proxy), weights[0]) as files:
        file = files.open(WEIGHTS)
        file.read(0, 8)
        s3_server.put("models", f"{weights[0].removeprefix('s3://models/')}/w.bin", os.urandom(40 * MIB + 17))
        with pytest.raises(SourceChanged, match=r"w\.bin"):
            file.read(WINDOW_BYTES, 8)
        with pytest.raises(SourceChanged, match=r"w\.bin"):
            file.check()


def test_another_tag_in_an_answer_is_a_change_though_the_store_let_the_condition_pass(
    proxy: Proxy, weights: tuple[str, bytes]
) -> None:
    def retag(call: Call, answered: Callable[[], Answer]) -> Answer:
        answer = answered()
        if call.range_bytes:
            answer.headers = {n: v for n, v in answer.headers.items() if n.lower() != "etag"} | {"ETag": '"new"'}
        return answer

    proxy.fault = retag
    with opened(make_stores(proxy), weights[0]) as files, pytest.raises(SourceChanged, match=r"w\.bin"):
        files.open(WEIGHTS).read(0, 8)


def _reset(answered: Callable[[], Answer]) -> Answer | None:
    del answered
    return None


def _unavailable(answered: Callable[[], Answer]) -> Answer:
    del answered
    return Answer(503, b"<Error><Code>SlowDown</Code></Error>")


def _truncated(answered: Callable[[], Answer]) -> Answer:
    answer = answered()
    answer.cut = len(answer.body) // 2
    return answer


@pytest.mark.parametrize("fault", [_reset, _unavailable, _truncated])
def test_passing_faults_are_gone_through(
    proxy: Proxy, weights: tuple[str, bytes], fault: Callable[[Callable[[], Answer]], Answer | None]
) -> None:
    uri, data = weights
    struck: set[str] = set()

    def once_for_each(call: Call, answered: Callable[[], Answer]) -> Answer | None:
        # Once for each end of a range: what is asked for again may begin behind what has come.
        about = f"{call.method} {call.path} {call.headers.get('range', '').rpartition('-')[2]}"
        if about in struck:
            return answered()
        struck.add(about)
        return fault(answered)

    proxy.fault = once_for_each
    with opened(make_stores(proxy), uri) as files:
        assert files.open(WEIGHTS).read(0, 20 * MIB).tobytes() == data[: 20 * MIB]
    assert len(struck) >= 4


@pytest.mark.parametrize("fault", [_reset, _unavailable, _truncated])
def test_a_fault_that_stays_is_a_clear_error_after_the_timeout(
    proxy: Proxy, weights: tuple[str, bytes], fault: Callable[[Callable[[], Answer]], Answer | None]
) -> None:
    with opened(make_stores(proxy, timeout_s=0.5), weights[0]) as files:
        proxy.fault = lambda _, answered: fault(answered)
        with pytest.raises(StorageFailure, match=r"w\.bin"):
            files.open(WEIGHTS).read(0, 8)


def test_a_store_that_never_answers_is_given_up(proxy: Proxy, weights: tuple[str, bytes]) -> None:
    released = threading.Event()
    with opened(make_stores(proxy, timeout_s=0.5), weights[0]) as files:
        proxy.fault = lambda _, __: _after(released)
        with pytest.raises(StorageFailure):
            files.open(WEIGHTS).read(0, 8)
    released.set()


def test_a_cancel_is_heard_while_a_store_does_not_answer(proxy: Proxy, weights: tuple[str, bytes]) -> None:
    asked, stalled, released = threading.Event(), threading.Event(), threading.Event()
    with opened(make_stores(proxy, timeout_s=60), weights[0], asked.is_set) as files:

        def stall(call: Call, answered: Callable[[], Answer]) -> Answer | None:
            del call, answered
            stalled.set()
            asked.set()
            return _after(released)

        proxy.fault = stall
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            files.open(WEIGHTS).read(0, 20 * MIB)
        # Far below the timeout: it was not waited for.
        assert time.monotonic() - begun < 20
    assert stalled.is_set()
    released.set()


def _after(event: threading.Event) -> None:
    event.wait(30)


@pytest.mark.parametrize("status", [401, 403, 404, 400, 500])
def test_what_a_store_says_when_it_refuses_is_never_repeated(proxy: Proxy, status: int) -> None:
    told = " ".join(SECRETS)
    proxy.fault = lambda _, __: Answer(status, f"<Error><Message>{told}</Message></Error>".encode())
    with pytest.raises(ArrowQuantError) as caught, opened(make_stores(proxy, timeout_s=0.3), "s3://models/x"):
        pass
    expected = {401: StoreRefused, 403: StoreRefused, 404: ModelNotFound}.get(status, StoreUnavailable)
    assert type(caught.value) is expected
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "or a log would show what it came from"
    assert not any(secret in caught.value.detail for secret in SECRETS)


def test_a_bucket_that_is_not_there_is_a_model_that_is_not_there(proxy: Proxy) -> None:
    with pytest.raises(ModelNotFound), opened(make_stores(proxy), "s3://no-such-bucket/x"):
        pass


def test_a_root_that_is_a_file_gives_no_way_to_what_lies_beside_it(proxy: Proxy, s3_server: S3) -> None:
    s3_server.put("models", "beside/model.safetensors.index.json", b"{}")
    uri = "s3://models/beside/model.safetensors.index.json"
    options = StoreOptions((parse_root(uri),), s3_endpoint=proxy.url, s3_region="us-east-1", allow_http=True)
    with pytest.raises(ModelNotFound), opened(Stores(options), uri):
        pass


def test_a_target_is_free_until_something_lies_there(proxy: Proxy, s3_server: S3) -> None:
    stores = make_stores(proxy)
    stores.check_free(parse_address("s3://models/free"))
    s3_server.put("models", "free/x", b"")
    with pytest.raises(TargetInUse):
        stores.check_free(parse_address("s3://models/free"))


def test_only_one_of_two_creates_an_object(proxy: Proxy) -> None:
    folder = make_stores(proxy).folder(parse_address("s3://models/created"))
    name = PurePosixPath("claim")
    assert [folder.create(name, b"mine"), folder.create(name, b"yours")] == [True, False]
    assert folder.read(name, 100) == b"mine"


def test_an_object_is_created_also_where_a_store_knows_no_conditions(proxy: Proxy) -> None:
    def without(call: Call, answered: Callable[[], Answer]) -> Answer:
        return Answer(501) if "if-none-match" in call.headers else answered()

    proxy.fault = without
    folder = make_stores(proxy, timeout_s=0.5).folder(parse_address("s3://models/unconditional"))
    name = PurePosixPath("claim")
    assert [folder.create(name, b"mine"), folder.create(name, b"yours")] == [True, False]


def test_a_conflict_of_two_calls_of_which_neither_made_the_object_is_tried_again(proxy: Proxy) -> None:
    struck = threading.Event()

    def conflict_once(call: Call, answered: Callable[[], Answer]) -> Answer:
        if call.method != "PUT" or struck.is_set():
            return answered()
        struck.set()
        return Answer(409, b"<Error><Code>ConditionalRequestConflict</Code></Error>")

    proxy.fault = conflict_once
    folder = make_stores(proxy).folder(parse_address("s3://models/met"))
    assert folder.create(PurePosixPath("claim"), b"mine")
    assert struck.is_set()
    assert folder.read(PurePosixPath("claim"), 100) == b"mine"


def test_an_upload_that_is_stopped_leaves_neither_object_nor_parts(proxy: Proxy, s3_server: S3, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(70 * MIB))
    folder = make_stores(proxy).folder(parse_address("s3://models/stopped"))
    begun = False

    def stop_when_begun() -> None:
        nonlocal begun
        begun = begun or any("partNumber" in call.path for call in proxy.calls)
        if begun:
            raise Cancelled("the run was cancelled")

    with pytest.raises(Cancelled):
        folder.upload(tmp_path / "w.bin", WEIGHTS, stop_when_begun)
    assert any("partNumber" in call.path for call in proxy.calls)
    assert s3_server.unfinished_uploads("models") == 0
    assert folder.is_empty()


# --- the hub


def save_model(folder: Path, data: bytes = b"") -> Path:
    """A folder with a large file and a small one."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(data or os.urandom(9 * MIB))
    (folder / "config.json").write_text("{}")
    return folder


def test_a_hub_is_read_from_where_it_sends_us_and_its_token_goes_nowhere_else(hub: Hub, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "net")
    uri = hub.put_folder("own/net", folder)
    with opened(make_stores(hub=hub), uri) as files:
        assert [str(name) for name in files.list().files] == ["config.json", "model.safetensors"]
        file = files.open(PurePosixPath("model.safetensors"))
        assert file.read(0, 9 * MIB).tobytes() == (folder / "model.safetensors").read_bytes()
        assert files.open(PurePosixPath("config.json")).read(0, 2).tobytes() == b"{}"
    assert hub.host.calls
    assert all("authorization" in call.headers for call in hub.calls)
    assert not any("authorization" in call.headers for call in hub.host.calls)


def test_an_address_that_has_expired_is_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "net")
    with opened(make_stores(hub=hub), hub.put_folder("own/net", folder)) as files:
        file = files.open(PurePosixPath("model.safetensors"))
        file.read(0, 8)
        hub.host.signature = "good-2"
        assert file.read(5 * MIB, 8).tobytes() == (folder / "model.safetensors").read_bytes()[5 * MIB :][:8]
    assert [call.path.rpartition("=")[2] for call in hub.host.calls] == ["good-1", "good-1", "good-2"]


def test_a_branch_that_moves_on_is_read_at_the_commit_it_was_pinned_to(hub: Hub, tmp_path: Path) -> None:
    old, new = save_model(tmp_path / "old", b"old"), save_model(tmp_path / "new", b"new")
    stores = make_stores(hub=hub)
    pinned = stores.pinned(parse_address(hub.put_folder("own/net", old)), lambda: False)
    assert pinned.revision == COMMIT
    hub.put_folder("own/net", new, revision=OTHER_COMMIT)
    hub.revisions["main"] = OTHER_COMMIT
    with closing(stores.files(pinned, lambda: False)) as files:
        assert files.open(PurePosixPath("model.safetensors")).read(0, 3).tobytes() == b"old"


def test_a_hub_that_gives_another_file_than_it_listed_is_a_change(hub: Hub, tmp_path: Path) -> None:
    uri = hub.put_folder("own/net", save_model(tmp_path / "net"))
    with opened(make_stores(hub=hub), uri) as files:
        hub.put_folder("own/net", save_model(tmp_path / "other"))
        with pytest.raises(SourceChanged, match=r"model\.safetensors"):
            files.open(PurePosixPath("model.safetensors")).read(0, 8)


def test_folders_and_single_files_of_a_hub_are_addresses_too(hub: Hub, tmp_path: Path) -> None:
    hub.put_folder("own/net", save_model(tmp_path / "net"), prefix="unet/")
    stores = make_stores(hub=hub)
    with opened(stores, "hf://own/net@main/unet") as files:
        assert files.has(PurePosixPath("config.json"))
    with opened(stores, "hf://own/net@main/unet/model.safetensors") as files:
        assert files.entry == PurePosixPath("model.safetensors")
    with pytest.raises(ModelNotFound), opened(stores, "hf://own/net@main/nothing"):
        pass


def test_what_a_hub_does_not_have_or_give_is_told_apart(hub: Hub, tmp_path: Path) -> None:
    hub.put_folder("own/net", save_model(tmp_path / "net"))
    hub.put_folder("own/gated", save_model(tmp_path / "gated"))
    hub.gated.add("own/gated")
    stores = make_stores(hub=hub, timeout_s=1)
    for uri, error, words in (
        ("hf://own/nothing", ModelNotFound, "no model own/nothing"),
        ("hf://own/net@v9", ModelNotFound, "revision"),
        ("hf://own/gated", StoreRefused, "gated"),
    ):
        with pytest.raises(error, match=words), opened(stores, uri):
            pass
    hub.token = "another"
    with pytest.raises(ModelNotFound, match="token"), opened(stores, "hf://own/net"):
        pass


def test_a_revision_that_holds_slashes_is_read_and_without_the_escape_is_explained(hub: Hub, tmp_path: Path) -> None:
    hub.put_folder("own/net", save_model(tmp_path / "net", b"main"))
    hub.put_folder("own/net", save_model(tmp_path / "pr", b"pr"), revision=OTHER_COMMIT)
    hub.revisions["refs/pr/1"] = OTHER_COMMIT
    with opened(make_stores(hub=hub), "hf://own/net@refs%2Fpr%2F1/model.safetensors") as files:
        assert files.open(PurePosixPath("model.safetensors")).read(0, 2).tobytes() == b"pr"
    with pytest.raises(ModelNotFound, match="%2F"), opened(make_stores(hub=hub), "hf://own/net@refs/pr/1"):
        pass


def test_a_root_of_the_hub_that_is_a_file_gives_no_way_to_what_lies_beside_it(hub: Hub, tmp_path: Path) -> None:
    hub.put_folder("own/net", save_model(tmp_path / "net"))
    uri = "hf://own/net@main/model.safetensors"
    stores = Stores(StoreOptions((parse_root(uri),), hub_endpoint=hub.url, allow_http=True))
    address = parse_address(uri)
    commit = stores.pinned(address, lambda: False).revision
    with pytest.raises(ModelNotFound), closing(stores.files(address, lambda: False, commit)):
        pass


def test_a_hub_that_never_answers_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(hub, "respond", lambda *_: _after(released))
    begun = time.monotonic()
    with pytest.raises(StoreUnavailable), opened(make_stores(hub=hub, timeout_s=0.5), "hf://own/net"):
        pass
    released.set()
    assert time.monotonic() - begun < 20, "it has a timeout of its own of 30 s"


def test_a_store_that_gives_no_entity_tags_is_said_to_be_unfit(proxy: Proxy, weights: tuple[str, bytes]) -> None:
    def untagged(_: Call, answered: Callable[[], Answer]) -> Answer:
        answer = answered()
        answer.body = answer.body.replace(b"ETag", b"Xtag")
        return answer

    proxy.fault = untagged
    with pytest.raises(StoreUnavailable, match="entity tags"), opened(make_stores(proxy), weights[0]):
        pass


def test_the_hub_is_not_written_to(hub: Hub) -> None:
    with pytest.raises(InvalidConfig, match="s3://"):
        make_stores(hub=hub).target("hf://own/net")


# --- what cannot be tried here, or is not there


@pytest.mark.parametrize(
    ("module", "extra", "uri"), [("obstore", "s3", "s3://models/x"), ("huggingface_hub", "hub", "hf://own/net")]
)
def test_without_its_extra_a_scheme_is_refused_with_how_to_get_it(
    module: str, extra: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InvalidConfig, match=rf"arrowquant-service\[{extra}\]"), opened(make_stores(), uri):
        pass


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_without_a_configuration_a_store_says_so_or_cannot_be_reached(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent")
    stores = make_stores(timeout_s=0.2)
    with pytest.raises((StoreRefused, StoreUnavailable), match=r"configured|reached"):
        stores.folder(parse_address(f"{scheme}://bucket/a"))


def test_random_reads_are_those_of_the_file(proxy: Proxy, weights: tuple[str, bytes], rng: np.random.Generator) -> None:
    uri, data = weights
    with opened(make_stores(proxy), uri) as files:
        file = files.open(WEIGHTS)
        for _ in range(40):
            start = int(rng.integers(0, len(data)))
            count = int(min(len(data) - start, rng.integers(0, 6 * MIB)))
            assert file.read(start, count).tobytes() == data[start : start + count]
