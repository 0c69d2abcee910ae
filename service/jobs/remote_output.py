"""An output on its way to a store: claimed, uploaded file by file, its manifest last; and taken back.

The claim is an object of its own that is put there in one step, so that no two servers write to one place.
What was uploaded is noted beside the output, so that a restart goes on behind it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath

from service.engine.formats.weights import MANIFEST
from service.engine.progress import Cancelled as Stopped
from service.engine.publish import stop_when
from service.errors import StoreUnavailable, TargetInUse
from service.storage.calls import Calls
from service.storage.durable import remove, sync
from service.storage.object_store import ObjectStoreFolder
from service.storage.remote_address import RemoteAddress
from service.storage.remote_files import Entry
from service.storage.stores import Stores

CLAIM = PurePosixPath(".arrowquant-claim")
MANIFEST_NAME = PurePosixPath(MANIFEST)
#: How long whoever stops waits for an upload in parts that has begun: it is aborted then, and no part stays.
GRACE_S = 2.0
#: Of the objects that are read whole: a claim, a manifest.
MAX_WHOLE_BYTES = 100_000_000


class RemoteOutput:
    """One output of a job. Blocks; raises OSError or ArrowQuantError."""

    def __init__(self, job_id: str, name: str, work: Path, address: RemoteAddress, stores: Stores) -> None:
        """The output lies in `work`/`name` until it is published."""
        self._job_id = job_id
        self._folder = work / name
        self._note = work / f".{name}.uploaded"
        self._address = address
        self._stores = stores
        self._calls: Calls | None = None

    def publish(self, stopped: Stopped) -> None:
        """Upload what is not there yet, and free its space on this disk; raises TargetInUse, Cancelled."""
        if not self._folder.exists():
            return
        store = self._stores.folder(self._address)
        with closing(self._stores.calls(stopped, GRACE_S)) as calls:
            self._calls = calls
            if not self._note.exists():
                self._claim(store, calls)
                self._tell([])
            self._upload(store, calls, stopped)
            calls.run(partial(self._complete, store))
        remove(self._folder)

    def discard(self, published: Callable[[], Iterable[PurePosixPath]]) -> None:
        """Remove what was uploaded; `published` names the files, where none is left on this disk because all were.

        After a `publish` that was stopped its last call is waited for: it may put an object there as long as it is
        under way. Raises StoreUnavailable when it does not end.
        """
        store = self._stores.folder(self._address)
        is_settled = self._calls is None or self._calls.settled()
        with closing(self._stores.calls(lambda: False)) as calls:
            if self._note.exists():
                names = {*self._uploaded(), *(name for _, name in self._files()), MANIFEST_NAME, CLAIM}
                # The manifest first: without it nobody takes the rest for a model.
                calls.run(partial(store.remove, sorted(names, key=lambda name: name != MANIFEST_NAME)))
            elif not self._folder.exists():
                calls.run(partial(store.remove, [MANIFEST_NAME, *published()]))
            elif calls.run(partial(store.read, CLAIM, MAX_WHOLE_BYTES)) == self._claimed_by:
                calls.run(partial(store.remove, [CLAIM]))
        if not is_settled:
            raise StoreUnavailable("an upload that was stopped has not ended, and may put an object there yet")

    @property
    def _claimed_by(self) -> bytes:
        return self._job_id.encode()

    def _claim(self, store: ObjectStoreFolder, calls: Calls) -> None:
        is_new = calls.run(partial(store.create, CLAIM, self._claimed_by))
        if not is_new and calls.run(partial(store.read, CLAIM, MAX_WHOLE_BYTES)) != self._claimed_by:
            raise TargetInUse("another output is being written to this address: choose another")
        if calls.run(partial(store.holds_more_than, CLAIM)):
            calls.run(partial(store.remove, [CLAIM]))
            raise TargetInUse("there are objects below this address: choose another")

    def _upload(self, store: ObjectStoreFolder, calls: Calls, stopped: Stopped) -> None:
        def go_on() -> None:
            stop_when(stopped)
            calls.come_on()

        done = self._uploaded()
        for path, name in self._files():
            stop_when(stopped)
            if name == MANIFEST_NAME or (name in done and calls.run(partial(store.stat, name)) == done[name]):
                continue
            tag = calls.run(partial(store.upload, path, name, go_on))
            self._tell([(name, Entry(path.stat().st_size, tag))])

    def _complete(self, store: ObjectStoreFolder) -> None:
        manifest = (self._folder / MANIFEST).read_bytes()
        if not store.create(MANIFEST_NAME, manifest) and store.read(MANIFEST_NAME, MAX_WHOLE_BYTES) != manifest:
            raise TargetInUse("somebody else has put a model there meanwhile")
        store.remove([CLAIM])

    def _files(self) -> Iterator[tuple[Path, PurePosixPath]]:
        for path in sorted(self._folder.rglob("*")):
            if path.is_file():
                yield path, PurePosixPath(path.relative_to(self._folder).as_posix())

    def _uploaded(self) -> dict[PurePosixPath, Entry]:
        """What the note tells. A line that a crash has cut is as good as none."""
        found: dict[PurePosixPath, Entry] = {}
        for line in self._note.read_text(encoding="utf-8").splitlines(keepends=True) if self._note.exists() else []:
            if line.endswith("\n"):
                name, size, tag = json.loads(line)
                found[PurePosixPath(name)] = Entry(size, tag)
        return found

    def _tell(self, uploaded: Iterable[tuple[PurePosixPath, Entry]]) -> None:
        with self._note.open("a", encoding="utf-8") as file:
            for name, entry in uploaded:
                file.write(json.dumps([str(name), entry.size, entry.tag]) + "\n")
            file.flush()
        sync(self._note)
        sync(self._note.parent)
