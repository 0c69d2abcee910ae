"""Models that lie in a store: ranged reads, several at once, each bound to the version of the file that was listed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from service.errors import ModelNotFound, SourceChanged, StoreUnavailable
from service.storage.calls import Calls
from service.storage.model_files import Bytes, Identity, Listing, ModelFiles, OpenFile

#: Of one request of a large read; so many are under way at once.
PART_BYTES = 8 << 20
PARTS_AT_ONCE = 8
#: What is read for a small one: its neighbours come next, and then cost no request. The last few are kept.
WINDOW_BYTES = 4 << 20
WINDOWS_KEPT = 4
#: Beyond this a folder is not a model.
MAX_ENTRIES = 100_000
#: Of a name on any disk.
MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as the store lists it; the tag is another when its bytes are."""

    size: int
    tag: str

    @property
    def identity(self) -> Identity:
        """What tells it from what it may be later."""
        return self.size, self.tag


#: Bytes start to stop of a file that is still this entry; raises SourceChanged, StoreUnavailable or StoreRefused.
Fetch = Callable[[PurePosixPath, Entry, int, int], memoryview]
#: The entry that a file has now, None when it is not there.
Stat = Callable[[PurePosixPath], Entry | None]


class RemoteFiles(ModelFiles):
    """Files of a store, as they were when the address was looked at."""

    def __init__(
        self,
        name: str,
        entry: PurePosixPath | None,
        files: Mapping[PurePosixPath, Entry],
        *,
        warnings: Iterable[str] = (),
        stat: Stat,
        fetch: Fetch,
        calls: Calls,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """`files` are all of a folder, or at least `entry`; `calls` is closed with this, and `release` called."""
        self.name = name
        self.entry = entry
        self._files = dict(files)
        self._warnings = tuple(warnings)
        self._folders = {parent for file in files for parent in file.parents}
        self._stat = stat
        self._calls = calls
        self._release = release
        self._windows = Windows(fetch, calls)

    def exists(self) -> bool:
        """See `ModelFiles.exists`."""
        return bool(self._files)

    def list(self) -> Listing:
        """See `ModelFiles.list`."""
        return Listing(sorted(self._files), self._warnings)

    def names_in(self, folder: PurePosixPath) -> Sequence[str]:
        """See `ModelFiles.names_in`."""
        return sorted({path.name for path in (*self._files, *self._folders) if path.parent == folder and path.name})

    def has(self, name: PurePosixPath) -> bool:
        """See `ModelFiles.has`."""
        return self._find(name) is not None

    def has_folder(self, name: PurePosixPath) -> bool:
        """See `ModelFiles.has_folder`."""
        return name in self._folders

    def size(self, name: PurePosixPath) -> int:
        """See `ModelFiles.size`."""
        return self._get(name).size

    def identity(self, name: PurePosixPath) -> Identity:
        """See `ModelFiles.identity`."""
        return self._get(name).identity

    def open(self, name: PurePosixPath, expected: Identity | None = None) -> RemoteFile:
        """See `ModelFiles.open`."""
        entry = self._get(name)
        if expected not in (None, entry.identity):
            raise source_changed(name)
        return RemoteFile(name, entry, self._windows, self.stat)

    def stat(self, name: PurePosixPath) -> Entry | None:
        """The entry that a file has in the store now."""
        return self._calls.run(partial(self._stat, name))

    def close(self) -> None:
        """See `ModelFiles.close`."""
        self._calls.close()
        self._release()

    def _find(self, name: PurePosixPath) -> Entry | None:
        # Only the address of a folder has been listed: what an index names beside itself is asked for.
        if name not in self._files and self.entry is not None and (found := self.stat(name)) is not None:
            self._files[name] = found
        return self._files.get(name)

    def _get(self, name: PurePosixPath) -> Entry:
        entry = self._find(name)
        if entry is None:
            raise ModelNotFound(f"There is no file {name} in the model.")
        return entry


class RemoteFile(OpenFile):
    """A file of a store, as it was listed."""

    def __init__(self, name: PurePosixPath, entry: Entry, windows: Windows, stat: Stat) -> None:
        self.name = name
        self._entry = entry
        self._windows = windows
        self._stat = stat

    @property
    def size(self) -> int:
        """See `OpenFile.size`."""
        return self._entry.size

    def read(self, offset: int, count: int) -> Bytes:
        """See `OpenFile.read`."""
        return self._windows.read(self.name, self._entry, offset, count)

    def check(self) -> None:
        """See `OpenFile.check`."""
        if self._stat(self.name) != self._entry:
            raise source_changed(self.name)

    def close(self) -> None:
        """Nothing is open between two reads."""


class Windows:
    """Reads of files: large ones in parts, small ones from windows that they share with their neighbours."""

    def __init__(self, fetch: Fetch, calls: Calls) -> None:
        self._fetch = fetch
        self._calls = calls
        self._kept: OrderedDict[tuple[PurePosixPath, int], Bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: PurePosixPath, entry: Entry, offset: int, count: int) -> Bytes:
        """`count` bytes of a file from `offset` on, in memory of their own."""
        if not 0 <= offset <= offset + count <= entry.size:
            raise ValueError(f"bytes {offset} to {offset + count} of {name}, which has {entry.size}")
        data = np.empty(count, np.uint8)
        if count >= WINDOW_BYTES:
            self._fill(name, entry, offset, data)
            return data
        done = 0
        while done < count:
            start, window = self._window(name, entry, (offset + done) // WINDOW_BYTES)
            piece = window[offset + done - start :][: count - done]
            data[done : done + piece.size] = piece
            done += piece.size
        return data

    def _window(self, name: PurePosixPath, entry: Entry, number: int) -> tuple[int, Bytes]:
        start, key = number * WINDOW_BYTES, (name, number)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return start, self._kept[key]
        window = np.empty(min(WINDOW_BYTES, entry.size - start), np.uint8)
        self._fill(name, entry, start, window)
        with self._lock:
            self._kept[key] = window
            while len(self._kept) > WINDOWS_KEPT:
                self._kept.popitem(last=False)
        return start, window

    def _fill(self, name: PurePosixPath, entry: Entry, offset: int, data: Bytes) -> None:
        def part(begin: int) -> None:
            end = min(begin + PART_BYTES, data.size)
            got = np.frombuffer(self._fetch(name, entry, offset + begin, offset + end), np.uint8)
            if got.size != end - begin:
                raise StoreUnavailable(f"the store sent {got.size} bytes of {name} where {end - begin} were asked for")
            data[begin:end] = got

        self._calls.run_all([partial(part, begin) for begin in range(0, data.size, PART_BYTES)])


def usable_files(found: Iterable[tuple[str, Entry]]) -> tuple[dict[PurePosixPath, Entry], list[str]]:
    """By name relative to the folder, what can be a file on a disk; and warnings of what cannot.

    Hidden files are passed over, and so are the empty objects that some tools put where others have folders.
    """
    files: dict[PurePosixPath, Entry] = {}
    warnings: list[str] = []
    for name, entry in found:
        parts = name.split("/")
        if any(part.startswith(".") and part != ".." for part in parts):
            continue
        if all(_is_a_name(part) for part in parts):
            files[PurePosixPath(name)] = entry
        elif name:
            warnings.append(f"{name!r:.200} is left out: a file cannot have this name")
    folders = {parent for file in files for parent in file.parents}
    return {name: entry for name, entry in files.items() if name not in folders}, warnings


def source_changed(name: PurePosixPath) -> SourceChanged:
    """The error of a file that is no longer the one that was listed."""
    return SourceChanged(
        f"{name} was changed, replaced or removed while it was being read. Submit the job again when it is at rest."
    )


def _is_a_name(part: str) -> bool:
    try:
        encoded = part.encode()
    except UnicodeEncodeError:
        return False
    return part not in ("", ".", "..") and len(encoded) <= MAX_NAME_BYTES and not {"\0", "\\"} & set(part)
