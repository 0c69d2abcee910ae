"""The bytes of what jobs wrote, on this disk or in a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from anyio import CapacityLimiter

from service.engine.formats.source import LocalFiles
from service.errors import ForbiddenPath, ModelNotFound, NotFound, StoreUnavailable
from service.jobs.job import Artifact
from service.storage.faults import storage_faults
from service.storage.model_files import ModelFiles, OpenFile
from service.storage.remote_address import REMOTE_SCHEMES, RemoteAddress, parse_address, scheme_of
from service.storage.stores import Stores

#: Reads of stores for downloads, at once; as many more may wait.
STORE_READS = 40


class Contents:
    """Opens artifacts. Blocks on files and the network."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        #: For the threads of calls about what lies in a store: others do not wait for those.
        self.store_threads = CapacityLimiter(STORE_READS)

    def path(self, artifact: Artifact) -> Path | None:
        """Where a file lies on this disk, None when it lies in a store."""
        return None if scheme_of(artifact.location) in REMOTE_SCHEMES else Path(artifact.location)

    def threads_for(self, artifact: Artifact) -> CapacityLimiter | None:
        """Where a call about an artifact gets its thread, None is with all others; raises StoreUnavailable."""
        if self.path(artifact) is not None:
            return None
        if self.store_threads.statistics().tasks_waiting >= STORE_READS:
            raise StoreUnavailable("too many downloads wait for stores already: try again when they are well")
        return self.store_threads

    def check(self, artifact: Artifact) -> None:
        """Raise NotFound when a file is not there any more, or another one is; of a store also StorageFailure."""
        with self.opened(artifact):
            pass

    @contextmanager
    def opened(self, artifact: Artifact) -> Iterator[OpenFile]:
        """A file to read from; raises what `check` raises. Reads raise SourceChanged and StorageFailure."""
        files = self._files(artifact)
        try:
            with storage_faults(f"opening {artifact.path}"):
                opened = files.open(PurePosixPath(artifact.location.rpartition("/")[2]))
        except ModelNotFound as error:
            files.close()
            raise _removed(artifact) from error
        try:
            if opened.size != artifact.size_bytes:
                raise NotFound(f"{artifact.path} was changed where the job wrote it")
            yield opened
        finally:
            opened.close()
            files.close()

    def _files(self, artifact: Artifact) -> ModelFiles:
        path = self.path(artifact)
        if path is not None:
            return LocalFiles(path)
        try:
            return self._stores.hurried.file(self._address(artifact))
        except ModelNotFound as error:
            raise _removed(artifact) from error

    def _address(self, artifact: Artifact) -> RemoteAddress:
        try:
            return self._stores.checked(parse_address(artifact.location))
        except ForbiddenPath as error:
            raise NotFound(f"{artifact.path} lies in a store that this server may no longer name") from error


def _removed(artifact: Artifact) -> NotFound:
    return NotFound(f"{artifact.path} was removed from where the job wrote it")
