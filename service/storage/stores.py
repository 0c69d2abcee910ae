"""What requests may read from and write to beside this machine's disk, by address."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from service.errors import InvalidConfig, ModelNotFound, TargetInUse
from service.storage.calls import Calls
from service.storage.object_store import ObjectStoreFolder
from service.storage.remote_address import (
    HUB_SCHEME,
    REMOTE_SCHEMES,
    RemoteAddress,
    check_allowed,
    is_a_root,
    parse_address,
    scheme_of,
)
from service.storage.remote_files import PARTS_AT_ONCE, Entry, RemoteFiles, usable_files
from service.storage.store_options import StoreOptions

if TYPE_CHECKING:
    from service.storage.hub import HubRepository

Cancelled = Callable[[], bool]
#: At most so long a request is looked at before it is accepted.
CLIENT_WAITS_S = 10.0


class Stores:
    """Finds models and free places in stores. Blocks on the network."""

    def __init__(self, options: StoreOptions) -> None:
        self._options = options

    @property
    def hurried(self) -> Stores:
        """The same for as long as a client waits for the answer: a store that does not answer is given up soon."""
        return Stores(replace(self._options, timeout_s=min(self._options.timeout_s, CLIENT_WAITS_S)))

    def address(self, uri: str) -> RemoteAddress | None:
        """The address in a store that a request names, None when it names a file.

        Raises InvalidConfig, or ForbiddenPath for whatever the operator has not listed.
        """
        if scheme_of(uri) not in REMOTE_SCHEMES:
            return None
        return self.checked(parse_address(uri))

    def checked(self, address: RemoteAddress) -> RemoteAddress:
        """The address; raises ForbiddenPath for what the operator has not listed."""
        check_allowed(address, self._options.roots)
        return address

    def files(self, address: RemoteAddress, cancelled: Cancelled, commit: str | None = None) -> RemoteFiles:
        """The files at an address, as they are now, or of the hub at a commit; to be closed.

        `cancelled` is asked as long as they are read. Raises ModelNotFound, StoreRefused, StorageFailure,
        UnsupportedModel, InvalidConfig without the extra, or Cancelled.
        """
        calls = Calls(PARTS_AT_ONCE, cancelled, self._options.timeout_s)
        try:
            if address.scheme == HUB_SCHEME:
                return calls.run(partial(_of_hub, address, commit or address.revision, self._options, calls))
            return calls.run(partial(_of_object_store, address, self._options, calls))
        except BaseException:
            calls.close()
            raise

    def pinned(self, address: RemoteAddress, cancelled: Cancelled) -> RemoteAddress:
        """The address with the commit that its revision names now; of anything but the hub as it is."""
        if address.scheme != HUB_SCHEME:
            return address
        with closing(self.calls(cancelled)) as calls:
            repository = calls.run(partial(_repository, address, self._options))
        repository.close()
        return address.at(repository.commit)

    def file(self, address: RemoteAddress) -> RemoteFiles:
        """The one file at an address, to be closed; raises ModelNotFound and what `files` raises."""
        calls = Calls(PARTS_AT_ONCE, lambda: False, self._options.timeout_s)
        try:
            return calls.run(partial(_one_object, address, self._options, calls))
        except BaseException:
            calls.close()
            raise

    def target(self, uri: str) -> RemoteAddress | None:
        """Where an output is to go, None when that is this disk; raises InvalidConfig or ForbiddenPath."""
        if scheme_of(uri) == HUB_SCHEME:
            raise InvalidConfig("models can be read from hf:// but not written there: write to s3://, gs:// or az://")
        return self.address(uri)

    def folder(self, address: RemoteAddress) -> ObjectStoreFolder:
        """What lies below an address; raises InvalidConfig without the extra."""
        return ObjectStoreFolder(address, self._options)

    def calls(self, cancelled: Cancelled, grace_s: float = 0.0) -> Calls:
        """Where to make calls to `folder`, one after the other, so that a cancel is heard; to be closed."""
        return Calls(1, cancelled, self._options.timeout_s, grace_s)

    def check_free(self, address: RemoteAddress) -> None:
        """Raise TargetInUse unless nothing lies below an address."""
        folder = self.folder(address)
        with closing(self.calls(lambda: False)) as calls:
            is_free = calls.run(folder.is_empty)
        if not is_free:
            raise TargetInUse("there are objects below this address: choose another")


def _of_object_store(address: RemoteAddress, options: StoreOptions, calls: Calls) -> RemoteFiles:
    folder = ObjectStoreFolder(address, options)
    files, warnings = usable_files(folder.entries())
    if files or not address.path:
        return RemoteFiles(
            address.name, None, files, warnings=warnings, stat=folder.stat, fetch=folder.fetch, calls=calls
        )
    if is_a_root(address, options.roots):
        raise ModelNotFound("there is no model at this address")  # what lies beside it is not under the root
    return _one_object(address, options, calls)


def _one_object(address: RemoteAddress, options: StoreOptions, calls: Calls) -> RemoteFiles:
    around = ObjectStoreFolder(RemoteAddress(address.scheme, address.parts[:-1]), options)
    entry = PurePosixPath(address.name)
    found = around.stat(entry)
    if found is None:
        raise ModelNotFound("there is no model at this address")
    return RemoteFiles(address.name, entry, {entry: found}, stat=around.stat, fetch=around.fetch, calls=calls)


def _of_hub(address: RemoteAddress, revision: str, options: StoreOptions, calls: Calls) -> RemoteFiles:
    pinned = address.at(revision)
    repository = _repository(pinned, options)
    files, warnings = usable_files(repository.entries())
    if files or not address.path:
        return _files_of_hub(repository, address.name, None, files, warnings, calls)
    repository.close()
    if is_a_root(address, options.roots):
        raise ModelNotFound("there is no model at this address")  # what lies beside it is not under the root
    repository = _repository(RemoteAddress(address.scheme, pinned.parts[:-1]), options)
    entry = PurePosixPath(address.name)
    found = repository.stat(entry)
    if found is None:
        repository.close()
        raise ModelNotFound("there is no model at this address")
    return _files_of_hub(repository, address.name, entry, {entry: found}, [], calls)


def _repository(address: RemoteAddress, options: StoreOptions) -> HubRepository:
    # It loads an HTTP client, and few servers are ever asked for a model of the hub.
    from service.storage.hub import HubRepository

    return HubRepository(address, options)


def _files_of_hub(
    repository: HubRepository,
    name: str,
    entry: PurePosixPath | None,
    files: Mapping[PurePosixPath, Entry],
    warnings: Sequence[str],
    calls: Calls,
) -> RemoteFiles:
    return RemoteFiles(
        name,
        entry,
        files,
        warnings=warnings,
        stat=repository.stat,
        fetch=repository.fetch,
        calls=calls,
        release=repository.close,
    )
