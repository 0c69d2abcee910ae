"""Addresses of models in stores: `s3://`, `gs://`, `az://` and `hf://`, and which of them a request may name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from service.errors import ForbiddenPath, InvalidConfig

#: A bucket or container, and a path in it.
OBJECT_SCHEMES = ("s3", "gs", "az")
HUB_SCHEME = "hf"
REMOTE_SCHEMES = (*OBJECT_SCHEMES, HUB_SCHEME)
MAIN = "main"
MAX_ADDRESS_BYTES = 1024

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
#: What no part of an address may hold: control characters, and what would be read in more than one way.
_AMBIGUOUS = re.compile("[\x00-\x1f\x7f-\x9f\\\\%?#*\ud800-\udfff]")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
#: A branch may have slashes, which an address has to write %2F: another part begins at a plain one.
_REVISION = re.compile(rf"{_HUB_NAME.pattern}(?:/{_HUB_NAME.pattern})*")
_SLASH = re.compile("%2F", re.IGNORECASE)
_FORBIDDEN = "the address is not under a remote root of this server; the operator adds one with --remote-root"


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """An address as its segments: bucket and path, or of the hub owner, name, revision and path."""

    scheme: str
    parts: tuple[str, ...]

    @property
    def bucket(self) -> str:
        """The bucket or container."""
        return self.parts[0]

    @property
    def repository(self) -> str:
        """Of the hub: `owner/name`."""
        return "/".join(self.parts[:2])

    @property
    def revision(self) -> str:
        """Of the hub: a branch, a tag or a commit."""
        return self.parts[2]

    @property
    def path(self) -> tuple[str, ...]:
        """The path in the bucket or in the repository; may be empty."""
        return self.parts[3:] if self.scheme == HUB_SCHEME else self.parts[1:]

    @property
    def name(self) -> str:
        """The last part of it, for messages."""
        return (self.path or self.parts[:2])[-1]

    @property
    def key(self) -> PurePosixPath:
        """What no two different places share, and what is above those around it."""
        return PurePosixPath(f"{self.scheme}:", *(part.replace("/", "%2F") for part in self.parts))

    def at(self, revision: str) -> RemoteAddress:
        """The same of the hub at another revision."""
        return RemoteAddress(self.scheme, (*self.parts[:2], revision, *self.path))

    def file(self, name: str) -> str:
        """The address of a file below it, as people write it."""
        return f"{self.scheme}://{'/'.join(self.parts)}/{name}"


def scheme_of(uri: str) -> str:
    """What stands before the first colon, in small letters; empty when there is none."""
    return uri.partition(":")[0].lower() if ":" in uri else ""


def parse_address(uri: str) -> RemoteAddress:
    """The address that a request gives; raises InvalidConfig or ForbiddenPath, without repeating what may be secret."""
    scheme, parts = _split(uri)
    if not parts:
        raise InvalidConfig(f"the {scheme}:// address names nothing: it needs {_shape(scheme)}")
    if scheme != HUB_SCHEME:
        return RemoteAddress(scheme, parts)
    if len(parts) < 2:
        raise InvalidConfig(f"the hf:// address needs {_shape(scheme)}")
    return RemoteAddress(scheme, _hub_parts(parts, default_revision=MAIN))


def parse_root(uri: str) -> RemoteAddress:
    """What an operator lists: an address, or the beginning of one, as `s3://` alone; raises InvalidConfig."""
    scheme, parts = _split(uri)
    return RemoteAddress(scheme, _hub_parts(parts) if scheme == HUB_SCHEME else parts)


def check_allowed(address: RemoteAddress, roots: Iterable[RemoteAddress]) -> None:
    """Raise ForbiddenPath unless the address is one of the roots or below one; whole segments are compared."""
    for root in roots:
        if address.scheme == root.scheme and address.parts[: len(root.parts)] == root.parts:
            return
    raise ForbiddenPath(_FORBIDDEN)


def is_a_root(address: RemoteAddress, roots: Iterable[RemoteAddress]) -> bool:
    """Whether the address is a root itself, which is a folder by definition."""
    return address in tuple(roots)


def _split(uri: str) -> tuple[str, tuple[str, ...]]:
    scheme, colon, rest = uri.partition("://")
    scheme = scheme.lower()
    if not colon or scheme not in REMOTE_SCHEMES:
        raise InvalidConfig(f"an address in a store begins with {', '.join(f'{s}://' for s in REMOTE_SCHEMES)}")
    # None of the messages repeats the address: what somebody put into it may be a password.
    if len(rest.encode(errors="replace")) > MAX_ADDRESS_BYTES:
        raise InvalidConfig(f"the {scheme}:// address is longer than {MAX_ADDRESS_BYTES} bytes")
    if _AMBIGUOUS.search(_SLASH.sub("", rest) if scheme == HUB_SCHEME else rest):
        raise InvalidConfig(
            f"the {scheme}:// address holds a query, a fragment, a percent sign, a star, a backslash or a control "
            "character: write plain names, and give credentials to the server, not to a request"
        )
    parts = tuple(rest.removesuffix("/").split("/")) if rest else ()
    if scheme != HUB_SCHEME and parts and not _BUCKET.fullmatch(parts[0]):
        raise InvalidConfig(
            f"the {scheme}:// address needs {_shape(scheme)}: no user, password or port belongs into it"
        )
    if ".." in parts:
        raise ForbiddenPath(_FORBIDDEN)
    if any(part in ("", ".") for part in parts):
        raise InvalidConfig(f"the {scheme}:// address has an empty part or one that is a dot")
    return scheme, parts


def _hub_parts(parts: tuple[str, ...], default_revision: str | None = None) -> tuple[str, ...]:
    """Owner, name, revision and path, as many of them as there are; `name@revision` is two."""
    owner, named, path = parts[:1], parts[1:2], parts[2:]
    if not named:
        names: tuple[str, ...] = owner
        revision: tuple[str, ...] = ()
    else:
        name, at, written = named[0].partition("@")
        names = (*owner, name)
        chosen = _SLASH.sub("/", written) if at else default_revision
        revision = (chosen,) if chosen is not None else ()
        if path and not at:
            raise InvalidConfig("the hf:// address has a path but no revision: write hf://owner/name@revision/path")
    if not all(map(_HUB_NAME.fullmatch, names)) or not all(map(_REVISION.fullmatch, revision)) or "%" in "".join(path):
        raise InvalidConfig(f"the hf:// address needs {_shape(HUB_SCHEME)}: no user, password or port belongs into it")
    return (*names, *revision, *path)


def _shape(scheme: str) -> str:
    if scheme == HUB_SCHEME:
        return "an owner and a name, as in hf://owner/name@revision"
    return f"a bucket and a path, as in {scheme}://bucket/models/minilm"
