"""A device of the `cuda` backend made of fibers: the very kernels, compiled by g++ and run on this processor.

The memory that kernels write is poisoned first, and looked at behind every array when they have ended.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from service.engine.backends.cupy_device import KERNELS
from service.engine.backends.device import Device
from service.engine.backends.work import ALIGNMENT, THREADS, Bytes, Work

SOURCES = ("dequantize", "measure", "quantize", "quantize_many", "search", "search_many")
FIBERS = Path(__file__).parent / "fibers"
COMPILE = [
    "g++",
    "-std=c++17",
    "-O1",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
]
SANITIZE = ["-g", "-fsanitize=address", "-fno-omit-frame-pointer"]
#: What fresh memory holds: as a float32 a large number, as a code none of those below 165.
POISON = 0xA5
GUARD_BYTES = 4096


def compiled(source: str, *options: str) -> Path:
    """The shared library of a source; made once for each text of it."""
    texts = [*sorted(KERNELS.iterdir()), *sorted(FIBERS.iterdir())]
    key = hashlib.sha256(repr((source, options)).encode() + b"".join(t.read_bytes() for t in texts if t.is_file()))
    path = Path(tempfile.gettempdir()) / f"arrowquant-fibers-{key.hexdigest()[:32]}.so"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as made:
            pass
        command = [*COMPILE, *options, f"-I{KERNELS}", f'-DSOURCE="{source}.cu"', str(FIBERS / "run.cpp")]
        subprocess.run([*command, "-o", made.name], check=True, timeout=300)
        Path(made.name).replace(path)
    return path


@cache
def library(source: str, *options: str) -> ctypes.CDLL:
    """The kernels of a source, loaded."""
    loaded = ctypes.CDLL(str(compiled(source, *options)))
    loaded.launch.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p]
    loaded.launch.restype = None
    return loaded


class FiberDevice(Device):
    """Has `memory_bytes` of memory and not a byte more."""

    def __init__(self, memory_bytes: int = 1 << 30, name: str = "fibers", options: tuple[str, ...] = ()) -> None:
        self.name, self.slots = name, 2
        self._memory_bytes, self._options = memory_bytes, options
        self._used_bytes = 0

    def submit(self, work: Work) -> Any:
        """Runs it all at once; what comes back is compared and copied when it is collected."""
        nbytes = work.input_bytes + work.output_bytes
        if self._used_bytes + nbytes > self._memory_bytes:
            raise MemoryError(f"{nbytes} bytes more than the {self._used_bytes} of {self._memory_bytes} in use")
        self._used_bytes += nbytes
        read, written = _aligned(work.input_bytes), _aligned(work.output_bytes)
        work.fill(read)
        task = work.task(read.ctypes.data, written.ctypes.data)
        sent = read.copy()
        if work.clears:
            written[: work.output_bytes] = 0
        for launch in work.launches:
            loaded = library(launch.source, *self._options)
            loaded.launch(getattr(loaded, launch.kernel), launch.blocks, THREADS, task.ctypes.data)
        assert np.array_equal(read, sent), "a kernel has changed its input"
        return work, written

    def collect(self, ticket: Any) -> None:
        """See `Device.collect`."""
        work, written = ticket
        self._used_bytes -= work.input_bytes + work.output_bytes
        _check_guards(work, written)
        work.take(written)

    def release(self) -> None:
        """See `Device.release`."""
        self._used_bytes = 0


def _aligned(nbytes: int) -> Bytes:
    memory = np.full(nbytes + GUARD_BYTES + ALIGNMENT, POISON, np.uint8)
    return memory[-memory.ctypes.data % ALIGNMENT :][: nbytes + GUARD_BYTES]


def _check_guards(work: Work, written: Bytes) -> None:
    """Nothing is written between the arrays and behind them."""
    outside = np.ones(written.size, bool)
    start = 0
    for array in work.outputs.values():
        outside[start : start + array.nbytes] = False
        start += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    expected = np.full(written.size, POISON, np.uint8)
    if work.clears:
        expected[: work.output_bytes] = 0
    assert np.array_equal(written[outside], expected[outside]), "a kernel has written past the end of an array"
