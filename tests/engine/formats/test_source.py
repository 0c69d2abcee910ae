"""Reading files of this machine."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path, PurePosixPath

import pytest

from service.engine.formats.source import AHEAD_BYTES, BLOCK_BYTES, SourceFile
from tests.server import wait_until


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file of which no page is in memory."""
    path = tmp_path / "weights"
    with path.open("wb") as file:
        for number in range(AHEAD_BYTES // BLOCK_BYTES):
            file.write(bytes([number]) * BLOCK_BYTES)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if _is_in_memory(path, AHEAD_BYTES - BLOCK_BYTES):
        pytest.skip("this file system lies in memory")
    return path


def _is_in_memory(path: Path, offset: int) -> bool:
    """Asked so that it does not get there by asking."""
    found = (ctypes.c_ubyte * 1)()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE, offset=offset) as page:
        start = ctypes.c_ubyte.from_buffer(page)
        address = ctypes.c_void_p(ctypes.addressof(start))
        del start
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(mmap.PAGESIZE), found) == 0
    return bool(found[0] & 1)


def test_the_disk_brings_what_lies_behind_a_block_that_is_read(cold: Path) -> None:
    file = SourceFile(cold.parent, PurePosixPath(cold.name))
    assert not file.read(0, BLOCK_BYTES).any()
    wait_until(lambda: _is_in_memory(cold, AHEAD_BYTES - BLOCK_BYTES))
    file.close()


def test_blocks_are_the_same_in_whatever_order_they_are_read(cold: Path) -> None:
    file = SourceFile(cold.parent, PurePosixPath(cold.name))
    for number in (0, 60, 3, 3, 59, 63, 1):
        assert (file.read(number * BLOCK_BYTES, BLOCK_BYTES) == number).all()
    file.close()
