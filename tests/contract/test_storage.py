"""What holds for every kind of address that requests may give, looked up as the service does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.engine.formats.registry import open_model
from service.errors import ForbiddenPath, InvalidConfig, ModelNotFound, TargetInUse
from service.storage.file import SUPPORTED_SCHEMES, locate_target, resolve_model, resolve_target
from tests.engine.helpers import normal, save_folder


@dataclass(frozen=True)
class Place:
    """Somewhere that models can be put, and the address of a name in it."""

    folder: Path
    roots: list[Path]

    def address(self, name: str) -> str:
        """As a request gives it."""
        return (self.folder / name).as_uri()


def _files(tmp_path: Path) -> Place:
    (tmp_path / "models").mkdir()
    return Place(tmp_path / "models", [tmp_path / "models"])


#: A place of each kind; a new scheme needs one here.
PLACES: dict[str, Callable[[Path], Place]] = {"file": _files}


@pytest.fixture(params=SUPPORTED_SCHEMES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place of each kind that the service supports."""
    return PLACES[request.param](tmp_path)


def test_a_model_at_an_address_can_be_opened(place: Place) -> None:
    save_folder(place.folder / "tiny", {"w.weight": normal(8, 8)})
    for name in ("tiny", "tiny/model.safetensors"):
        reader = open_model(resolve_model(place.address(name), place.roots))
        assert [t.name for t in reader.tensors] == ["w.weight"]
        reader.close()


def test_what_is_not_there_is_not_found(place: Place) -> None:
    with pytest.raises(ModelNotFound):
        resolve_model(place.address("nothing"), place.roots)


def test_an_address_outside_the_roots_is_forbidden_to_read_and_to_write(place: Place) -> None:
    for use in (resolve_model, locate_target, resolve_target):
        with pytest.raises(ForbiddenPath) as caught:
            use(place.address("tiny"), [])
        assert str(place.folder) not in caught.value.detail


def test_a_target_is_free_until_something_is_there(place: Place) -> None:
    address = place.address("new")
    target = resolve_target(address, place.roots)
    assert target == locate_target(address, place.roots)
    save_folder(target, {"w.weight": normal(8, 8)})
    with pytest.raises(TargetInUse):
        resolve_target(address, place.roots)
    assert locate_target(address, place.roots) == target == resolve_model(address, place.roots)


@pytest.mark.parametrize("scheme", ["s3", "hf", "http", "ftp", ""])
def test_every_other_scheme_is_refused_with_those_there_are(scheme: str) -> None:
    assert scheme not in SUPPORTED_SCHEMES
    for use in (resolve_model, locate_target, resolve_target):
        with pytest.raises(InvalidConfig) as caught:
            use(f"{scheme}://place/model", [])
        assert not scheme or all(f"{known}://" in caught.value.detail for known in SUPPORTED_SCHEMES)
