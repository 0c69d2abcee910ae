"""Memory for large results that is used again: the kernel clears fresh pages slower than ours fill them."""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

#: Smaller arrays come from the usual allocator, which keeps their memory by itself.
SMALLEST_BYTES = 1 << 20
#: What is kept at most while nobody uses it.
KEPT_BYTES = 128 << 20


class Buffers:
    """Hands out arrays, and takes their memory back when the last view of them is gone. Thread-safe."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        # A deque, whose single steps cannot be interrupted: memory comes back wherever an array happens to end, even
        # amid a step of this class, where a lock would be held already.
        self._free: deque[mmap.mmap] = deque()

    @property
    def free_bytes(self) -> int:
        """What waits to be used again."""
        return sum(len(block) for block in list(self._free))

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Like `numpy.empty`."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes < SMALLEST_BYTES:
            return np.empty(shape, dtype)
        block = self._take(nbytes)
        owner = np.frombuffer(block, np.uint8, nbytes)
        weakref.finalize(owner, self._return, block).atexit = False
        return owner.view(dtype).reshape(shape)

    def _take(self, nbytes: int) -> mmap.mmap:
        """A free block that is not twice as large, or a new one."""
        for _ in range(len(self._free)):
            try:
                block = self._free.popleft()
            except IndexError:
                break
            if nbytes <= len(block) <= 2 * nbytes:
                return block
            self._free.append(block)
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _return(self, block: mmap.mmap) -> None:
        """Keep a block, and let go of those that have waited longest."""
        self._free.append(block)
        while self.free_bytes > self._kept_bytes:
            try:
                self._free.popleft()
            except IndexError:
                break
