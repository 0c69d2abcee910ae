"""Files under their SHA-256: parts that grow at their end while they are sent, and whole ones that never change."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from service.storage.durable import remove, sync

if TYPE_CHECKING:
    from hashlib import _Hash

#: Read at once where a part is hashed again.
READ_BYTES = 4 << 20
#: Parts whose hash is remembered between two calls; that of any other is computed from its bytes.
REMEMBERED = 256


class PartInfo(NamedTuple):
    """A part as it lies on the disk; `mtime` in seconds since 1970."""

    owner: str
    digest: str
    size: int
    mtime: float


class Part:
    """A blob that is being sent: what is written is appended, and hashed on the way. For one writer at a time.

    Nothing is buffered here: what `write` has taken outlives the process. Raises OSError.
    """

    def __init__(self, path: Path, known: _Hash | None) -> None:
        """`known` is the hash of what the file holds; without it the file is read once."""
        self.path = path
        self._file = path.open("a+b", buffering=0)
        self.offset = os.fstat(self._file.fileno()).st_size
        self.hash = known or self._rehash()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append data; when that fails, `offset` tells how much of it there was room for."""
        view = memoryview(data)
        while view:
            count = self._file.write(view)
            self.hash.update(view[:count])
            self.offset += count
            view = view[count:]

    def sync(self) -> None:
        """Make all that was written durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._file.close()

    def _rehash(self) -> _Hash:
        running = hashlib.sha256()
        self._file.seek(0)
        while chunk := self._file.read(READ_BYTES):
            running.update(chunk)
        return running


class BlobFiles:
    """`sha256/ab/abcd…` for whole blobs, one file for all; `parts/<owner>/<digest>` for what is on its way.

    Each owner has parts of their own, so that none can be told from another's whether they send
    the same. Every method blocks and raises OSError; they may be called from any thread.
    """

    def __init__(self, root: Path) -> None:
        self._whole = root / "sha256"
        self._parts = root / "parts"
        self._lock = threading.Lock()
        self._hashes: OrderedDict[tuple[str, str], tuple[int, _Hash]] = OrderedDict()

    def create(self) -> None:
        """Make the folders."""
        self._whole.mkdir(parents=True, exist_ok=True)
        self._parts.mkdir(parents=True, exist_ok=True)

    # --- whole blobs ---

    def path(self, digest: str) -> Path:
        """Where a whole blob lies."""
        return self._whole / digest[:2] / digest

    def digests(self) -> Iterator[str]:
        """Every whole blob."""
        for folder in _listed(self._whole):
            yield from (path.name for path in _listed(folder))

    def install(self, owner: str, digest: str) -> None:
        """Make a synced part, whose hash was compared, the whole blob; where that is there already it stays."""
        path = self.path(digest)
        path.parent.mkdir(exist_ok=True)
        # A link, not a rename: until the part is removed, nothing that happens costs its bytes.
        with suppress(FileExistsError):
            os.link(self._part(owner, digest), path)
        sync(path.parent)
        sync(self._whole)

    def remove(self, digest: str) -> None:
        """Remove a whole blob."""
        remove(self.path(digest))

    def lay_out(self, files: Mapping[str, str], folder: Path) -> None:
        """Make a folder of links: relative path to digest. What is there from an earlier time stays."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, digest in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                _link(self.path(digest), target)

    # --- parts ---

    def part_size(self, owner: str, digest: str) -> int:
        """How much of a blob has come; 0 when nothing has."""
        try:
            return self._part(owner, digest).stat().st_size
        except FileNotFoundError:
            return 0

    def open_part(self, owner: str, digest: str) -> Part:
        """The part to go on with, or an empty one."""
        path = self._part(owner, digest)
        path.parent.mkdir(exist_ok=True)
        with self._lock:
            size, known = self._hashes.pop((owner, digest), (0, None))
        return Part(path, known if size == self.part_size(owner, digest) else None)

    def close_part(self, owner: str, digest: str, part: Part) -> None:
        """Let go of a part, and remember its hash for whoever goes on with it."""
        part.close()
        with self._lock:
            self._hashes[owner, digest] = (part.offset, part.hash)
            while len(self._hashes) > REMEMBERED:
                self._hashes.popitem(last=False)

    def remove_part(self, owner: str, digest: str) -> None:
        """Forget all that has come of a blob."""
        remove(self._part(owner, digest))

    def parts(self, owner: str | None = None) -> Iterator[PartInfo]:
        """Every part, of one owner or of all."""
        folders = [self._parts / owner] if owner else _listed(self._parts)
        for folder in folders:
            for path in _listed(folder):
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    yield PartInfo(folder.name, path.name, stat.st_size, stat.st_mtime)

    def _part(self, owner: str, digest: str) -> Path:
        return self._parts / owner / digest


def _listed(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where there is none."""
    return list(folder.iterdir()) if folder.is_dir() else []


def owner_of(tenant: str) -> str:
    """A tenant as the name of a folder, whatever characters it has."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:32]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:
        # Some file systems have no hard links, others few for one file.
        target.symlink_to(source)
