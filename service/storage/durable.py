"""Files that are whole or not there: written beside, synced, renamed; and folders removed for good."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

#: Linux alone has it, and Python does not know it.
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

#: Copied between two looks at whether to stop.
COPY_BYTES = 8 << 20


def write_file(path: Path, data: bytes) -> None:
    """Put data at path in one step that survives a crash; raises OSError."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_writeback(descriptor: int, offset: int, count: int) -> None:
    """Have the kernel begin to write these bytes of a file to the disk, so that a later sync waits less."""
    if _sync_file_range is not None:
        # Whether it does is of no consequence: the sync will tell.
        _sync_file_range(descriptor, offset, count, _SYNC_FILE_RANGE_WRITE)


def copy_folder(source: Path, target: Path, stopped: Callable[[], bool]) -> bool:
    """Copy a folder into a new one, synced; False when `stopped` said so on the way. Raises OSError."""
    target.mkdir()
    for entry in sorted(source.iterdir()):
        copy = copy_folder if entry.is_dir() else _copy_file
        if not copy(entry, target / entry.name, stopped):
            return False
    sync(target)
    return True


def _copy_file(source: Path, target: Path, stopped: Callable[[], bool]) -> bool:
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(COPY_BYTES):
            if stopped():
                return False
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return True


def remove(path: Path) -> None:
    """Remove a file or folder if it is there; what resists is logged, since a clean-up has to go on."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
    if os.path.lexists(path):
        logger.warning("could not remove all of %s", path)
