"""`s3://`, `gs://` and `az://` through obstore: listing, ranged reads bound to a version, uploads that are whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from service.errors import ArrowQuantError, ModelNotFound, StoreRefused, StoreUnavailable, UnsupportedModel
from service.storage.remote_address import RemoteAddress
from service.storage.remote_files import MAX_ENTRIES, Entry, source_changed
from service.storage.store_faults import is_passing, require, status_in, store_error
from service.storage.store_options import StoreOptions

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")
EXTRA = "s3"
#: Of one request; a stalled connection is given up earlier than a store that answers with errors.
REQUEST_S = 30.0
CONNECT_S = 5.0
ATTEMPTS = 10
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
#: Of a multipart upload, of which stores take so many.
UPLOAD_PART_BYTES = 16 << 20
MAX_UPLOAD_PARTS = 10_000
UPLOADS_AT_ONCE = 4
NOT_IMPLEMENTED = 501
LISTING = "listing the folder"
UPLOAD_READ_BYTES = 4 << 20


class ObjectStoreFolder:
    """What lies below an address; each method blocks, for `timeout_s` at most when the store does not answer.

    Raises StoreRefused, ModelNotFound where there is no such bucket, and StoreUnavailable.
    """

    def __init__(self, address: RemoteAddress, options: StoreOptions) -> None:
        """Raises InvalidConfig when the extra is not installed, or the store not configured."""
        self._obs: Any = require("obstore", address.scheme, EXTRA)
        self.address = address
        self._timeout_s = options.timeout_s
        self._prefix = "/".join(address.path)
        self._store = _open(address, options)

    def entries(self, limit: int = MAX_ENTRIES) -> list[tuple[str, Entry]]:
        """Every object below, by its name relative to the address; raises UnsupportedModel beyond `limit`."""
        return [(self._relative(meta["path"]), _entry(meta)) for meta in self._listed(limit)]

    def is_empty(self) -> bool:
        """Whether nothing lies below."""
        return not self._call(lambda: next(self._pages(), []), LISTING)

    def holds_more_than(self, name: PurePosixPath) -> bool:
        """Whether anything lies below but this one object."""
        first = self._call(lambda: list(islice(chain.from_iterable(self._pages()), 2)), LISTING)
        return any(meta["path"] != self._key(name) for meta in first)

    def stat(self, name: PurePosixPath) -> Entry | None:
        """The object of this name, None when there is none."""
        try:
            return _entry(self._call(lambda: self._obs.head(self._store, self._key(name)), f"looking at {name}"))
        except ModelNotFound:
            return None

    def fetch(self, name: PurePosixPath, entry: Entry, start: int, stop: int) -> memoryview:
        """Bytes start to stop of an object that is still this entry; else raises SourceChanged."""
        options = {"range": (start, stop), "if_match": f'"{entry.tag}"'}

        def get() -> memoryview:
            try:
                answer = self._obs.get(self._store, self._key(name), options=options)
            except (FileNotFoundError, self._obs.exceptions.PreconditionError):
                raise source_changed(name) from None
            if _entry(answer.meta) != entry:
                raise source_changed(name)
            data = memoryview(answer.bytes())
            if len(data) != stop - start:
                raise _Broken
            return data

        return self._call(get, f"reading {name}")

    def read(self, name: PurePosixPath, max_bytes: int) -> bytes | None:
        """All of a small object, None when there is none."""
        entry = self.stat(name)
        if entry is None or entry.size > max_bytes:
            return None
        return bytes(self.fetch(name, entry, 0, entry.size)) if entry.size else b""

    def create(self, name: PurePosixPath, data: bytes) -> bool:
        """Put a small object where there is none; False when there is one. In one step, where the store can."""
        exceptions = self._obs.exceptions
        put = partial(self._obs.put, self._store, self._key(name), data)

        def create() -> bool:
            try:
                put(mode="create")
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                if self.stat(name) is None:
                    raise _Broken from None  # two calls have met, and S3 let neither of them win
                return False
            return True

        try:
            return self._call(create, f"writing {name}")
        except _Unsupported:
            if self.stat(name) is not None:
                return False
            self._call(put, f"writing {name}")
        return True

    def upload(self, path: Path, name: PurePosixPath, advance: Callable[[], None]) -> str:
        """Put a file of this machine there, in parts, whole or not at all; its tag.

        `advance` is called again and again, and what it raises ends the upload, of which nothing is kept.
        """
        size = path.stat().st_size

        def put() -> Any:
            return self._obs.put(
                self._store,
                self._key(name),
                _chunks(path, advance),
                use_multipart=size > UPLOAD_PART_BYTES,
                chunk_size=max(UPLOAD_PART_BYTES, size // MAX_UPLOAD_PARTS + 1),
                max_concurrency=UPLOADS_AT_ONCE,
            )

        return _tag(self._call(put, f"writing {name}")["e_tag"])

    def remove(self, names: Iterable[PurePosixPath]) -> None:
        """Remove objects; those that are not there are no matter."""
        for name in names:
            with suppress(ModelNotFound):
                self._call(partial(self._obs.delete, self._store, self._key(name)), f"removing {name}")

    def _listed(self, limit: int) -> list[Any]:
        def listing() -> list[Any]:
            found: list[Any] = []
            for page in self._pages():
                found += page
                if len(found) > limit:
                    raise UnsupportedModel(f"The folder holds more than {limit} files. Give the model's own folder.")
            return found

        # As a whole: a listing that broke off goes on as if it had ended.
        return self._call(listing, LISTING)

    def _pages(self) -> Iterator[list[Any]]:
        return iter(self._obs.list(self._store, self._prefix or None, chunk_size=1000))

    def _key(self, name: PurePosixPath) -> str:
        return f"{self._prefix}/{name}" if self._prefix else str(name)

    def _relative(self, key: str) -> str:
        return key[len(self._prefix) + 1 :] if self._prefix else key

    def _call(self, call: Callable[[], T], doing: str) -> T:
        """Make a call again until the store has answered it or the time is over; then raise what it means.

        obstore repeats requests by itself, but not where the body of an answer breaks off.
        """
        exceptions = self._obs.exceptions
        deadline, pause = time.monotonic() + self._timeout_s, FIRST_PAUSE_S
        while True:
            try:
                return call()
            except ArrowQuantError:
                raise
            except FileNotFoundError:
                status: int | None = 404
            except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
                status = 403
            except exceptions.InvalidPathError:
                raise UnsupportedModel("the folder holds an object whose name is no path: remove it") from None
            except (_Broken, exceptions.BaseError) as error:
                status = status_in(error)
            if status == NOT_IMPLEMENTED:
                raise _Unsupported(f"the store cannot do what it takes while {doing}") from None
            if not is_passing(status) or time.monotonic() + pause > deadline:
                raise store_error(status, f"{self.address.scheme}://{self.address.bucket}", doing) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


class _Unsupported(StoreUnavailable):
    """The store has no such operation."""


class _Broken(Exception):
    """An answer was shorter than it said."""


def _open(address: RemoteAddress, options: StoreOptions) -> ObjectStore:
    store = require("obstore.store", address.scheme, EXTRA)
    common: dict[str, Any] = {
        "client_options": {
            "allow_http": options.allow_http,
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "timeout": timedelta(seconds=min(REQUEST_S, options.timeout_s)),
        },
        "retry_config": {
            "max_retries": ATTEMPTS,
            "retry_timeout": timedelta(seconds=options.timeout_s),
            "backoff": {
                "init_backoff": timedelta(seconds=FIRST_PAUSE_S),
                "max_backoff": timedelta(seconds=LONGEST_PAUSE_S),
                "base": 2,
            },
        },
    }
    kinds = {
        "s3": ("S3Store", {"endpoint": options.s3_endpoint, "region": options.s3_region}),
        "gs": ("GCSStore", {"base_url": options.gs_endpoint}),
        "az": ("AzureStore", {"endpoint": options.az_endpoint}),
    }
    kind, given = kinds[address.scheme]
    config = {name: value for name, value in given.items() if value is not None}
    try:
        opened: ObjectStore = getattr(store, kind)(address.bucket, config=config, **common)
    except (require("obstore.exceptions", address.scheme, EXTRA).BaseError, ValueError, OSError):
        raise StoreRefused(
            f"{address.scheme}:// is not configured on this server, or not as it has to be: the operator sets the "
            "variables of the store's own tools"
        ) from None
    return opened


def _entry(meta: Any) -> Entry:
    return Entry(meta["size"], _tag(meta["e_tag"]))


def _tag(e_tag: str | None) -> str:
    if not e_tag:
        raise StoreUnavailable("the store gives its objects no entity tags, without which no change would be noticed")
    return e_tag.removeprefix("W/").strip('"')


def _chunks(path: Path, advance: Callable[[], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(UPLOAD_READ_BYTES):
            advance()
            yield chunk
    advance()
