"""From written to published: companions beside the weights, everything synced, hashed, listed, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import mimetypes
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from service.engine.formats.base import FileEntry, ModelLayout
from service.engine.formats.weights import MANIFEST
from service.errors import Cancelled, TargetInUse
from service.storage.durable import copy_folder, sync

PARTIAL = ".partial"
CHUNK_BYTES = 4 << 20
HASHED_BYTES = 1 << 20
MEDIA_TYPES = {".parquet": "application/vnd.apache.parquet", ".safetensors": "application/octet-stream"}

#: Called with the bytes just worked on; raises Cancelled when the run is to stop.
Advance = Callable[[int], None]


def copy_companions(layout: ModelLayout, folder: Path, advance: Advance) -> None:
    """Copy the files that go along, except those that the writer made anew.

    Raises SourceChanged when one is no longer the file that was there when the model was opened.
    """
    for relative in layout.companions:
        target = folder / relative
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            # Under its own name only when it is whole: a killed run is gone on from.
            beside = target.with_name(target.name + PARTIAL)
            _copy(layout, relative, beside, advance)
            beside.replace(target)


def _copy(layout: ModelLayout, relative: PurePosixPath, target: Path, advance: Advance) -> None:
    with (
        closing(layout.source.open(relative, layout.identities[relative])) as source,
        target.open("wb") as sink,
    ):
        for start in range(0, source.size, CHUNK_BYTES):
            chunk = source.read(start, min(CHUNK_BYTES, source.size - start))
            sink.write(chunk.data)
            advance(chunk.nbytes)


#: The SHA-256 of a file, if it is known already.
Known = Callable[[Path, Advance], str | None]


def seal(folder: Path, about: dict[str, Any], advance: Advance, known: Known) -> tuple[FileEntry, ...]:
    """Sync and hash every file, and write the manifest: `about` and the list of files."""
    manifest = folder / MANIFEST
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != manifest)
    with _syncing(paths):
        entries = [_entry(folder, path, known(path, advance) or _hashed(path, advance)) for path in paths]
    listed = [asdict(e) | {"path": str(e.path)} for e in entries]
    manifest.write_text(json.dumps(about | {"files": listed}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    entries.append(_entry(folder, manifest, _hashed(manifest, advance)))
    sync(manifest)
    for directory in {folder, *(p.parent for p in paths)}:
        sync(directory)
    return tuple(entries)


def publish(finished: Path, target: Path, *, synced: bool = True) -> None:
    """Make a finished folder appear as `target`, whole or not at all; not `synced` it may vanish with the power.

    Raises TargetInUse when the target exists and is not an empty folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        finished.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise TargetInUse(f"the target folder {target.name!r} exists and is not empty; choose another") from error
        if error.errno != errno.EXDEV:
            raise
        _publish_across(finished, target)
    if synced:
        sync(target.parent)


def _publish_across(finished: Path, target: Path) -> None:
    # Another file system: copy beside the target first, so that the last step is a rename all the same.
    beside = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        copy_folder(finished, beside, lambda: False)
        publish(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(finished)


@contextmanager
def _syncing(paths: Iterable[Path]) -> Iterator[None]:
    """Make files durable while the block hashes them: one waits for the disk, the other for the processor."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
    try:
        waiting = [pool.submit(sync, path) for path in paths]
        yield
        for done in waiting:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _hashed(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(HASHED_BYTES))  # used again: fresh memory takes longer than reading into it
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
            advance(count)
    return digest.hexdigest()


def _entry(folder: Path, path: Path, digest: str) -> FileEntry:
    relative = PurePosixPath(path.relative_to(folder).as_posix())
    media_type = MEDIA_TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return FileEntry(relative, path.stat().st_size, digest, media_type)


def stop_when(cancelled: Callable[[], bool]) -> None:
    """Raise Cancelled when the caller wants the run to stop."""
    if cancelled():
        raise Cancelled("the run was cancelled")
