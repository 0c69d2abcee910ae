"""`file://` addresses: which paths a request may name, and what it is told about all others.

Every path outside the model roots gets the same answer, whether something lies there or not.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote_to_bytes

from service.errors import (
    ForbiddenPath,
    InvalidConfig,
    ModelNotFound,
    RequestError,
    TargetInUse,
    UnsupportedModel,
)
from service.storage.remote_address import REMOTE_SCHEMES

#: The URI schemes that this server can read from; those of stores are looked up elsewhere.
SUPPORTED_SCHEMES = ("file", *REMOTE_SCHEMES)
#: Beyond this a folder is not a model; walking it would only cost time.
MAX_ENTRIES = 100_000
#: Room for what is put around a name while its folder is being written.
MAX_TARGET_NAME_BYTES = 180

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_FORBIDDEN = "the address is not under a model root of this server; the operator adds one with --model-root"


def resolve_model(uri: str, roots: Sequence[Path]) -> Path:
    """The file or folder that a source address names, links resolved.

    Raises InvalidConfig for what is no file address, ForbiddenPath for anything that lies or
    leads outside the roots, ModelNotFound, and UnsupportedModel for pipes, devices and sockets.
    What a file names, as an index does, is not known here: see `check_links`.
    """
    path = _inside(path_of(uri), roots)
    mode = _mode(path)
    if mode is None:
        raise ModelNotFound(f"there is no model at {uri!r} that this server can read")
    if stat.S_ISDIR(mode):
        _check_folder(path, roots)
    elif not stat.S_ISREG(mode):
        raise UnsupportedModel(f"{uri!r} is neither a file nor a folder")
    return path


def check_links(files: Iterable[Path], roots: Sequence[Path]) -> None:
    """Raise ForbiddenPath when one of the files of a model, its links resolved, lies outside the roots."""
    real_roots = _real(roots)
    for path in files:
        # Alike for all that lies outside, there or not; the name is one that the user put under a root.
        if not _is_under(_resolved(path), real_roots):
            raise ForbiddenPath(
                f"{path.name!r} in the model is a link that leads outside the model roots of this server:"
                " put the file itself there, or have the operator add a root with --model-root"
            )


def check_opened(descriptor: int, name: str, roots: Sequence[Path]) -> None:
    """Raise ForbiddenPath when an open file lies outside the roots.

    Whatever was looked at before it was opened, somebody may have put a link there in between.
    """
    found = Path(f"/proc/self/fd/{descriptor}").readlink()
    if not _is_under(found, _real(roots)):
        raise ForbiddenPath(
            f"{name!r} in the model has become a link that leads outside the model roots of this server"
        )


def locate_target(uri: str, roots: Sequence[Path]) -> Path:
    """The folder that an output address names, whether it is free or not.

    Its parent has to exist under a root. Raises InvalidConfig and ForbiddenPath.
    """
    path = path_of(uri)
    parent = _inside(path.parent, roots)
    if len(os.fsencode(path.name)) > MAX_TARGET_NAME_BYTES:
        raise InvalidConfig(f"the last part of {uri!r} is longer than {MAX_TARGET_NAME_BYTES} bytes")
    mode = _mode(parent)
    if mode is None or not stat.S_ISDIR(mode):
        raise InvalidConfig(f"the folder around {uri!r} does not exist: create it, or choose another address")
    target = parent / path.name
    if target.is_symlink():
        # Renaming would replace the link: only where it leads under the roots may that be told.
        _inside(target, roots)
        raise TargetInUse(f"{uri!r} is a link: give the address of a folder that does not exist yet")
    return target


def resolve_target(uri: str, roots: Sequence[Path]) -> Path:
    """As `locate_target`, and raises TargetInUse unless nothing or an empty folder is there."""
    target = locate_target(uri, roots)
    mode = _mode(target)
    if mode is not None and not (stat.S_ISDIR(mode) and not any(target.iterdir())):
        raise TargetInUse(f"{uri!r} exists and is not an empty folder: choose another address")
    return target


def path_of(uri: str) -> Path:
    """The absolute path in a file address, percent-decoded; touches no file."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise InvalidConfig(f"{uri!r} is not an address: write file:// and an absolute path")
    scheme, rest = match[1].lower(), match[2]
    if scheme in REMOTE_SCHEMES:
        raise InvalidConfig(f"{scheme}:// is not on this machine: a server reads from there (`--server`)")
    if scheme not in SUPPORTED_SCHEMES:
        raise InvalidConfig(f"{scheme}:// is not supported by this server, only {_listed(SUPPORTED_SCHEMES)}")
    if rest.startswith("//"):
        authority, slash, tail = rest[2:].partition("/")
        if authority not in ("", "localhost"):
            raise InvalidConfig(f"{uri!r} names a host: a file address has none, as in file:///models/minilm")
        rest = slash + tail
    if not rest.startswith("/"):
        raise InvalidConfig(f"{uri!r} holds no absolute path, as in file:///models/minilm")
    if "?" in rest or "#" in rest:
        raise InvalidConfig(f"{uri!r} holds a query or a fragment: write ? as %3F and # as %23")
    try:
        path = os.fsdecode(unquote_to_bytes(rest))
    except UnicodeEncodeError as error:
        raise InvalidConfig(f"{uri!r} holds half a character: percent-encode bytes that are no UTF-8") from error
    if "\0" in path or ".." in path.split("/"):
        raise ForbiddenPath(_FORBIDDEN)
    return Path(re.sub("^/+", "/", path))


def _listed(schemes: Sequence[str]) -> str:
    return ", ".join(f"{scheme}://" for scheme in schemes)


def _inside(path: Path, roots: Sequence[Path]) -> Path:
    """The path with its links resolved, when it lies under a root before and after."""
    real_roots = _real(roots)
    # By name first, so that nothing outside the roots is even looked at.
    if not _is_under(path, [*(root.absolute() for root in roots), *real_roots]):
        raise ForbiddenPath(_FORBIDDEN)
    real = _resolved(path)
    if not _is_under(real, real_roots):
        raise ForbiddenPath(_FORBIDDEN)
    return real


def _resolved(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except FileNotFoundError as error:  # a link that was removed while it was followed
        raise ModelNotFound("the model was exchanged while it was looked at: submit the job again") from error


def _real(roots: Sequence[Path]) -> list[Path]:
    return [Path(os.path.realpath(root)) for root in roots]


def _is_under(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _mode(path: Path) -> int | None:
    """What kind of thing lies at a path, or None; asks without opening, so a pipe cannot block."""
    try:
        return path.stat().st_mode
    except OSError:
        return None


def _check_folder(folder: Path, roots: Sequence[Path]) -> None:
    for count, (entry, path) in enumerate(_walk(folder)):
        if count >= MAX_ENTRIES:
            raise UnsupportedModel(f"the folder holds more than {MAX_ENTRIES} files: give the model's own folder")
        if entry.is_symlink():
            check_links([path], roots)
        mode = _mode(path)
        if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UnsupportedModel(f"the folder holds {entry.name!r}, which is neither a file nor a folder")


def _walk(folder: Path) -> Iterator[tuple[os.DirEntry[str], Path]]:
    """Every entry below a folder, links to folders followed, each folder once."""
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        real = str(_resolved(current))
        if real in seen:
            continue
        seen.add(real)
        for entry in _entries(current):
            yield entry, Path(entry.path)
            if Path(entry.path).is_dir():  # unlike the entry, asks about a ring of links without raising
                waiting.append(Path(entry.path))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _unreadable(folder) from error


def _unreadable(folder: Path) -> RequestError:
    return ModelNotFound(f"the folder {folder.name!r} of the model cannot be read by this server")
