"""What holds for every kind of address that requests may give, looked up as the service does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath

import pytest

from service.engine.formats.registry import open_model
from service.engine.formats.source import LocalFiles
from service.errors import ForbiddenPath, InvalidConfig, ModelNotFound, TargetInUse
from service.storage.file import SUPPORTED_SCHEMES, locate_target, resolve_model, resolve_target
from service.storage.model_files import ModelFiles
from service.storage.remote_address import parse_root
from service.storage.store_options import StoreOptions
from service.storage.stores import Stores
from tests.engine.helpers import normal, save_folder
from tests.stores import ACCESS_KEY, HUB_TOKEN, SECRET_KEY, GoogleStyle, Hub, running_s3


@dataclass(frozen=True)
class Place:
    """Somewhere that models can be put: what puts a folder there under a name, and the address of a name."""

    put: Callable[[str, Path], object]
    address: Callable[[str], str]
    roots: list[Path]
    stores: Stores
    can_write: bool = True

    def find(self, uri: str, *, allowed: bool = True) -> ModelFiles:
        """The files at an address."""
        stores = self.stores if allowed else Stores(StoreOptions())
        address = stores.address(uri)
        if address is not None:
            return stores.files(address, lambda: False)
        return LocalFiles(resolve_model(uri, self.roots if allowed else []))

    def target(self, uri: str, *, allowed: bool = True) -> PurePath:
        """Where an output would go."""
        stores = self.stores if allowed else Stores(StoreOptions())
        address = stores.target(uri)
        if address is None:
            return resolve_target(uri, self.roots if allowed else [])
        stores.check_free(address)
        return address.key


@contextmanager
def _files(tmp_path: Path) -> Iterator[Place]:
    root = tmp_path / "models"
    root.mkdir()
    yield Place(
        lambda name, folder: folder.rename(root / name),
        lambda name: (root / name).as_uri(),
        [root],
        Stores(StoreOptions()),
    )


def _options(scheme: str, **about: str) -> StoreOptions:
    return StoreOptions((parse_root(f"{scheme}://"),), s3_region="us-east-1", allow_http=True, timeout_s=5, **about)


@contextmanager
def _s3(tmp_path: Path) -> Iterator[Place]:
    del tmp_path
    with running_s3() as s3:
        bucket = s3.bucket("models")
        stores = Stores(_options("s3", s3_endpoint=s3.url))
        yield Place(lambda name, folder: s3.put_folder(bucket, name, folder), "s3://models/{}".format, [], stores)


@contextmanager
def _gs(tmp_path: Path) -> Iterator[Place]:
    del tmp_path
    with running_s3() as s3:
        bucket, way = s3.bucket("models"), GoogleStyle(s3.url)
        stores = Stores(_options("gs", gs_endpoint=way.url))
        yield Place(lambda name, folder: s3.put_folder(bucket, name, folder), "gs://models/{}".format, [], stores)
        way.close()


@contextmanager
def _az(tmp_path: Path) -> Iterator[Place]:
    del tmp_path
    pytest.skip("there is no server of Azure's blobs to try it with")
    yield  # the type of what never comes


@contextmanager
def _hf(tmp_path: Path) -> Iterator[Place]:
    del tmp_path
    hub = Hub(HUB_TOKEN)

    def put(name: str, folder: Path) -> None:
        hub.put_folder("own/net", folder, prefix=f"{name}/")

    stores = Stores(_options("hf", hub_endpoint=hub.url))
    yield Place(put, "hf://own/net@main/{}".format, [], stores, can_write=False)
    hub.close()


#: A place of each kind; a new scheme needs one here.
PLACES = {"file": _files, "s3": _s3, "gs": _gs, "az": _az, "hf": _hf}


@pytest.fixture(params=SUPPORTED_SCHEMES)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """An empty place of each kind that the service supports."""
    open_to_all = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(open_to_all))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    with PLACES[request.param](tmp_path) as made:
        yield made


def test_a_model_at_an_address_can_be_opened(place: Place, tmp_path: Path) -> None:
    place.put("tiny", save_folder(tmp_path / "tiny", {"w.weight": normal(8, 8)}))
    for name in ("tiny", "tiny/model.safetensors"):
        with closing(place.find(place.address(name))) as files, closing(open_model(files)) as reader:
            assert [t.name for t in reader.tensors] == ["w.weight"]
            assert (reader.rows(reader.tensors[0], 0, 8) == normal(8, 8)).all()


def test_what_is_not_there_is_not_found(place: Place) -> None:
    with pytest.raises(ModelNotFound):
        place.find(place.address("nothing"))


def test_an_address_outside_the_roots_is_forbidden_to_read_and_to_write(place: Place) -> None:
    uses: list[Callable[[], object]] = [lambda: place.find(place.address("tiny"), allowed=False)]
    if place.can_write:
        uses.append(lambda: place.target(place.address("tiny"), allowed=False))
    if place.roots:
        uses.append(lambda: locate_target(place.address("tiny"), []))
    for use in uses:
        with pytest.raises(ForbiddenPath) as caught:
            use()
        assert "tiny" not in caught.value.detail


def test_a_target_is_free_until_something_is_there(place: Place, tmp_path: Path) -> None:
    if not place.can_write:
        with pytest.raises(InvalidConfig):
            place.target(place.address("new"))
        return
    address = place.address("new")
    target = place.target(address)
    if place.roots:
        assert target == locate_target(address, place.roots)
    place.put("new", save_folder(tmp_path / "tiny", {"w.weight": normal(8, 8)}))
    with pytest.raises(TargetInUse):
        place.target(address)


@pytest.mark.parametrize("scheme", ["http", "ftp", ""])
def test_every_other_scheme_is_refused_with_those_there_are(scheme: str) -> None:
    assert scheme not in SUPPORTED_SCHEMES
    uri, stores = f"{scheme}://place/model", Stores(StoreOptions())
    assert stores.address(uri) is None
    assert stores.target(uri) is None
    for use in (resolve_model, locate_target, resolve_target):
        with pytest.raises(InvalidConfig) as caught:
            use(uri, [])
        assert not scheme or all(f"{known}://" in caught.value.detail for known in SUPPORTED_SCHEMES)
