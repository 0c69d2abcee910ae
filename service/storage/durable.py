"""Files that are whole or not there: written beside, synced, renamed; and folders removed for good."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)


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


def copy_folder(source: Path, target: Path, stopped: Callable[[], bool]) -> bool:
    """Copy a folder into a new one, synced; False when `stopped` said so on the way. Raises OSError."""
    target.mkdir()
    for entry in sorted(source.iterdir()):
        if stopped():
            return False
        if entry.is_dir():
            if not copy_folder(entry, target / entry.name, stopped):
                return False
            continue
        shutil.copyfile(entry, target / entry.name)
        sync(target / entry.name)
    sync(target)
    return True


def remove(path: Path) -> None:
    """Remove a file or folder if it is there; what resists is logged, since a clean-up has to go on."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=_note)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error)


def _note(function: Callable[..., object], path: str, info: tuple[object, BaseException, object]) -> None:
    del function
    if not isinstance(info[1], FileNotFoundError):
        logger.warning("could not remove %s: %s", path, info[1])
