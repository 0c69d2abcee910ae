"""Blobs: files that clients send once and jobs then use, kept apart by tenant and stored once for all.

A tenant has a blob when it has sent all of its bytes, whoever else has them stored here: so nobody
learns what another has. The file lies there once, and goes when the last tenant's reference goes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TypeVar

from service.errors import (
    BlobNotFound,
    BlobTooLarge,
    DigestMismatch,
    StorageQuotaExceeded,
    UploadInProgress,
    UploadOffsetMismatch,
)
from service.jobs import blob_table
from service.jobs.retention import Due
from service.jobs.store import Store
from service.jobs.times import text_of
from service.storage.faults import storage_faults
from service.storage.upload import BlobFiles, Part, PartInfo, owner_of

T = TypeVar("T")
#: Files looked up while others wait.
CHUNK = 100
#: A tenant and a SHA-256 in hexadecimal.
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class BlobLimits:
    """Bytes of one blob; bytes of a tenant, None for any number."""

    max_blob_bytes: int = 64 << 30
    max_stored_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes of a blob that a call sends: `start` to `stop` of `total`.

    Without `start` it sends none, and only asks to go on; `is_anew` forgets what came before.
    """

    start: int | None
    stop: int
    total: int
    is_anew: bool = False


class Upload:
    """One call that sends a blob, or a piece of it. Blocks; to be closed, which keeps what has come."""

    def __init__(self, blobs: Blobs, key: Key, part: Part, span: Span) -> None:
        self._blobs = blobs
        self._key = key
        self._part = part
        self._span = span

    @property
    def offset(self) -> int:
        """How much of the blob is here."""
        return self._part.offset

    @property
    def room(self) -> int:
        """How many bytes this call may still send."""
        return max(0, self._span.stop - self._part.offset) if self._span.start is not None else 0

    def write(self, data: bytes | bytearray) -> None:
        """Append data, at most `room` bytes; raises DiskFull or StorageFailure, and keeps what there was room for."""
        with storage_faults("storing the upload"):
            self._part.write(data)

    def finish(self) -> bool:
        """Make the blob the tenant's when all of it has come; False while something is missing.

        Raises DigestMismatch when it is another file than its name says: then nothing is kept.
        """
        if self._part.offset < self._span.total:
            return False
        self._blobs.complete(self._key, self._part)
        return True

    def close(self) -> None:
        """Let another call go on."""
        self._blobs.release(self._key, self._part)


class Blobs:
    """The blobs of one data folder. Thread-safe; every method blocks on files and the database."""

    def __init__(self, root: Path, store: Callable[[], Store], limits: BlobLimits) -> None:
        """`store` gives the opened store, or raises NotReady."""
        #: Where all of them lie.
        self.root = root
        self._files = BlobFiles(root)
        self._store = store
        self._limits = limits
        #: What is being sent, and how much of it there will be.
        self._sending: dict[Key, int] = {}
        # Held where files and references change together, so that none is ever without the other.
        self._lock = threading.Lock()

    # --- for clients ---

    def find(self, tenant: str, digest: str) -> int | None:
        """The size of a blob that the tenant has; asking counts as using it."""
        with self._lock:
            return self._use(tenant, {digest}).get(digest)

    def offset(self, tenant: str, digest: str) -> int:
        """How much of a blob the tenant has sent so far."""
        with storage_faults("looking at the upload"):
            return self._files.part_size(owner_of(tenant), digest)

    def begin(self, tenant: str, digest: str, span: Span) -> Upload:
        """Start to take the bytes of a span.

        Raises BlobTooLarge, StorageQuotaExceeded, UploadInProgress when another call is sending the
        same, and UploadOffsetMismatch when the span does not start where the last one ended.
        """
        if span.total > self._limits.max_blob_bytes:
            raise BlobTooLarge(f"the blob has {span.total} bytes; this server takes {self._limits.max_blob_bytes}")
        key = (tenant, digest)
        with self._lock, storage_faults("starting the upload"):
            if key in self._sending:
                raise UploadInProgress("another call is sending this blob: ask with HEAD how far it is, and go on then")
            self._check_quota(key, span.total)
            self._sending[key] = span.total
        try:
            with storage_faults("starting the upload"):
                return Upload(self, key, self._open_part(key, span), span)
        except BaseException:
            with self._lock:
                del self._sending[key]
            raise

    # --- for one upload ---

    def complete(self, key: Key, part: Part) -> None:
        """See `Upload.finish`."""
        tenant, digest = key
        owner = owner_of(tenant)
        found = part.hash.hexdigest()
        if found != digest:
            self._files.remove_part(owner, digest)
            raise DigestMismatch(f"the bytes that came have the SHA-256 {found}: nothing was kept, send the file again")
        with storage_faults("storing the upload"):
            part.sync()
            with self._lock:
                # The file first: one without a reference is removed at the next start.
                self._files.install(owner, digest)
                with self._store().transaction() as db:
                    blob_table.add(db, tenant, digest, part.offset)
        self._files.remove_part(owner, digest)

    def release(self, key: Key, part: Part) -> None:
        """See `Upload.close`."""
        tenant, digest = key
        try:
            self._files.close_part(owner_of(tenant), digest, part)
        finally:
            with self._lock:
                self._sending.pop(key, None)

    # --- for jobs ---

    def use(self, tenant: str, files: Mapping[str, str]) -> None:
        """Mark the blobs behind these paths as used; raises BlobNotFound, which points to the path of a missing one."""
        with self._lock:
            known = self._use(tenant, set(files.values()))
        for path, digest in files.items():
            if digest not in known:
                detail = f"sha256:{digest} is not among your blobs: send it with PUT /v1/blobs/sha256:{digest}"
                raise BlobNotFound(detail, pointer=f"/files/{_escaped(path)}")

    def lay_out(self, tenant: str, files: Mapping[str, str], folder: Path) -> None:
        """Make a folder of links to blobs, path to digest; raises BlobNotFound and OSError."""
        self.use(tenant, files)
        self._files.lay_out(files, folder)

    # --- for the operator ---

    def create(self) -> None:
        """Make the folders."""
        with storage_faults("opening the blobs"):
            self._files.create()

    def recover(self) -> Iterator[bool]:
        """Remove what a crash left: files that nobody has, parts of what is whole.

        Each step takes a few milliseconds, and others have their turn between two.
        """
        yield from self._stepwise(self._files.digests(), self._remove_orphans)
        yield from self._stepwise(self._files.parts(), self._remove_whole)

    def touch(self, in_use: Iterable[Key]) -> None:
        """Count these as used now."""
        with self._lock, self._store().transaction() as db:
            for tenant, digest in in_use:
                blob_table.use(db, tenant, [digest])

    def drop(self, unused: Sequence[Due], before: str) -> list[Due]:
        """Take blobs from their tenants that have not used them since; those it took. Files nobody has then go."""
        with self._lock, storage_faults("removing unused blobs"):
            with self._store().transaction() as db:
                dropped = [due for due in unused if blob_table.drop(db, due.tenant, due.id, before)]
                gone = [digest for digest in {due.id for due in dropped} if not blob_table.tenants(db, digest)]
            for digest in gone:
                self._files.remove(digest)
        return dropped

    def uploads(self, before: str) -> list[Due]:
        """Uploads that never became whole and have stood still since, longest first."""
        with self._lock, storage_faults("looking at uploads"):
            return sorted((due for due, _ in self._still() if due.since < before), key=lambda due: due.since)

    def drop_uploads(self, stale: Sequence[Due]) -> list[Due]:
        """Remove those of these uploads that nobody has gone on with; those it removed."""
        wanted = {(due.since, due.id) for due in stale}
        with self._lock, storage_faults("removing uploads that stand still"):
            dropped = [(due, part) for due, part in self._still() if (due.since, due.id) in wanted]
            for _, part in dropped:
                self._files.remove_part(part.owner, part.digest)
        return [due for due, _ in dropped]

    def upload_bytes(self) -> int:
        """How much has come of what is not whole."""
        with storage_faults("looking at uploads"):
            return sum(part.size for part in self._files.parts())

    # --- inside ---

    def _stepwise(self, found: Iterator[T], act: Callable[[Sequence[T]], None]) -> Iterator[bool]:
        """Do something with a few at a time, while no file and no reference changes."""
        while True:
            with self._lock, storage_faults("removing what a crash left of blobs"):
                chunk = list(islice(found, CHUNK))
                act(chunk)
            if not chunk:
                return
            yield True

    def _remove_orphans(self, digests: Sequence[str]) -> None:
        with self._store().reading() as db:
            orphans = [digest for digest in digests if not blob_table.tenants(db, digest)]
        for digest in orphans:
            self._files.remove(digest)

    def _remove_whole(self, parts: Sequence[PartInfo]) -> None:
        sending = self._parts_sent()
        with self._store().reading() as db:
            owners = {part.digest: {*map(owner_of, blob_table.tenants(db, part.digest))} for part in parts}
        for part in parts:
            if part.owner in owners[part.digest] and (part.owner, part.digest) not in sending:
                self._files.remove_part(part.owner, part.digest)

    def _still(self) -> list[tuple[Due, PartInfo]]:
        """What nobody is sending now, and since when."""
        sending = self._parts_sent()
        still = [part for part in self._files.parts() if (part.owner, part.digest) not in sending]
        return [(Due(text_of(datetime.fromtimestamp(p.mtime, UTC)), "", p.digest, p.size), p) for p in still]

    def _parts_sent(self) -> set[tuple[str, str]]:
        """Owner and digest of what is being sent now."""
        return {(owner_of(tenant), digest) for tenant, digest in self._sending}

    def _use(self, tenant: str, digests: set[str]) -> dict[str, int]:
        with self._store().transaction() as db:
            sizes = blob_table.use(db, tenant, digests)
            lost = {digest for digest in sizes if not self._files.path(digest).is_file()}
            for digest in lost:  # somebody has removed the file: it has to be sent again
                blob_table.forget(db, tenant, digest)
        return {digest: size for digest, size in sizes.items() if digest not in lost}

    def _check_quota(self, key: Key, total: int) -> None:
        tenant, digest = key
        with self._store().transaction() as db:
            stored, limit = blob_table.stored(db, tenant)
        limit = self._limits.max_stored_bytes if limit is None else limit
        if limit is None:
            return
        sending = {d: size for (t, d), size in self._sending.items() if t == tenant}
        parts = {part.digest: max(part.size, blob_table.MIN_BYTES) for part in self._files.parts(owner_of(tenant))}
        wanted = sum({**parts, **sending, digest: max(total, blob_table.MIN_BYTES)}.values())
        if stored + wanted > limit:
            raise StorageQuotaExceeded(
                f"the blob has {total} bytes, and of the {limit} that you may store {stored} are taken and "
                f"{wanted - total} promised to uploads that are not complete: purge jobs, or wait until blobs expire"
            )

    def _open_part(self, key: Key, span: Span) -> Part:
        owner, digest = owner_of(key[0]), key[1]
        if span.is_anew:
            self._files.remove_part(owner, digest)
        offset = self._files.part_size(owner, digest)
        if (span.start is not None and span.start != offset) or offset > span.total:
            raise UploadOffsetMismatch(f"{offset} bytes of this blob are here: go on from there")
        return self._files.open_part(owner, digest)


def _escaped(path: str) -> str:
    """A path as one step of a JSON pointer."""
    return path.replace("~", "~0").replace("/", "~1")
