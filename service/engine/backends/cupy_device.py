"""A CUDA device through CuPy: nothing but buffers, streams and launches; what is computed is in `cuda.py`.

Each slot has a stream with pinned memory on this side and memory on the device, so that one piece is sent up while
another is computed and a third comes back.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from service.engine.backends.device import Device, DeviceFailed
from service.engine.backends.work import THREADS, Bytes, Work

KERNELS = Path(__file__).parent / "kernels"
#: Codes are the reference's to the bit: nothing is fused, and subnormal numbers stay what they are.
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", f"-I{KERNELS}")
#: Upload, kernel and download.
SLOTS = 3
#: What `cudaMalloc` and the driver say when there is no more memory.
_OUT_OF_MEMORY = 2
#: What a library raises that is of another release, lacks a part, or is being replaced at the moment.
_BROKEN = (
    ImportError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
#: Copies to pinned memory are split over threads from this size on.
_SPLIT_BYTES = 1 << 20


def why_not() -> str | None:
    """Why no device can be used by this process, or None."""
    return _found()[1]


def device_count() -> int:
    """How many there are; 0 where none can be used."""
    return _found()[0]


@cache
def _found() -> tuple[int, str | None]:
    """How many devices there are, or 0 with the reason: looked for once, as a process keeps what it has imported."""
    try:
        import cupy
    except _BROKEN as error:
        return 0, f"CuPy cannot be imported ({_in_words(error)}); install the extra `cuda`"
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except _BROKEN as error:
        return 0, f"CUDA finds no device: {_in_words(error)}"
    if not count:
        return 0, "CUDA finds no device"
    try:
        cupy.cuda.nvrtc.getVersion()
    except _BROKEN as error:
        return 0, f"CuPy finds no NVRTC to compile kernels with ({_in_words(error)}); install the extra `cuda`"
    return count, None


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def compile_source(source: str, arch: str) -> bytes:
    """The CUBIN of `<source>.cu` for an architecture such as `sm_90`.

    Not through `cupy.RawModule`, which has subnormal numbers flushed to zero.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram((KERNELS / f"{source}.cu").read_text(), f"{source}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*OPTIONS, f"-arch={arch}"))
        # CuPy takes the last byte for the end of a text and leaves it out; the ELF file ends on a zero indeed.
        cubin: bytes = nvrtc.getCUBIN(program) + b"\0"
    except nvrtc.NVRTCError:
        raise DeviceFailed(f"{source}.cu does not compile for {arch}: {nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)
    return cubin


class CupyDevice(Device):
    """One CUDA device.

    Takes `limit_bytes` of its memory at most, 0 for as much as there is, and as much of this machine's, pinned.
    """

    def __init__(self, number: int, limit_bytes: int, threads: int) -> None:
        import cupy

        self._cupy = cupy
        self._device = cupy.cuda.Device(number)
        properties = cupy.cuda.runtime.getDeviceProperties(number)
        self.name = f"{properties['name'].decode()} {number}"
        self.slots = SLOTS
        self._arch = f"sm_{self._device.compute_capability}"
        self._memory = cupy.cuda.MemoryPool()
        with self._device:
            self._memory.set_limit(size=limit_bytes)
            self._slots = [_Slot(cupy, self._memory) for _ in range(SLOTS)]
        self._turn = 0
        self._kernels: dict[tuple[str, str], Any] = {}
        self._copiers = ThreadPoolExecutor(threads, thread_name_prefix="arrowquant-cuda")
        self._threads = threads

    def submit(self, work: Work) -> Any:
        """See `Device.submit`."""
        slot = self._slots[self._turn % SLOTS]
        with self._faults(), self._device, slot.stream:
            slot.reserve(work.input_bytes, work.output_bytes)
            work.fill(slot.sent, self._copy)
            slot.input.copy_from_host_async(ctypes.c_void_p(slot.sent.ctypes.data), work.input_bytes)
            if work.clears:
                slot.output.memset_async(0, work.output_bytes)
            task = work.task(slot.input.ptr, slot.output.ptr)  # passed by value
            for launch in work.launches:
                kernel = self.kernel(launch.source, launch.kernel)
                kernel((launch.blocks,), (THREADS,), (task,))
            slot.output.copy_to_host_async(ctypes.c_void_p(slot.received.ctypes.data), work.output_bytes)
        self._turn += 1
        return slot, work

    def collect(self, ticket: Any) -> None:
        """See `Device.collect`."""
        slot, work = ticket
        with self._faults(), self._device:
            slot.stream.synchronize()
        work.take(slot.received, self._copy)

    def release(self) -> None:
        """See `Device.release`."""
        with self._faults(), self._device:
            for slot in self._slots:
                slot.stream.synchronize()
                slot.drop()
            self._memory.free_all_blocks()

    def kernel(self, source: str, name: str) -> Any:
        """A kernel of a source, compiled if nobody has done so."""
        key = (source, name)
        if key not in self._kernels:
            self._kernels[key] = self._cupy.RawModule(path=str(self._cubin(source))).get_function(name)
        return self._kernels[key]

    def _cubin(self, source: str) -> Path:
        """The compiled source, from the disk if it is there."""
        digest = hashlib.sha256(repr((OPTIONS, self._arch, self._cupy.cuda.nvrtc.getVersion())).encode())
        for file in (*sorted(KERNELS.glob("*.cuh")), KERNELS / f"{source}.cu"):
            digest.update(file.read_bytes())
        path = _cache_folder() / f"{source}.{self._arch}.{digest.hexdigest()[:32]}.cubin"
        if not path.exists():
            written = path.with_suffix(f".{os.getpid()}")
            written.write_bytes(compile_source(source, self._arch))
            written.replace(path)
        return path

    def _copy(self, target: Bytes, source: Bytes) -> None:
        """By all threads: one alone copies slower than the bus takes."""
        if target.size < _SPLIT_BYTES or self._threads == 1:
            np.copyto(target, source)
            return
        share = -(-target.size // self._threads)
        parts = [slice(start, start + share) for start in range(0, target.size, share)]
        list(self._copiers.map(lambda part: np.copyto(target[part], source[part]), parts))

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """CuPy's errors as MemoryError, which its own one is already, or DeviceFailed."""
        cuda = self._cupy.cuda
        try:
            yield
        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError) as error:
            if error.status == _OUT_OF_MEMORY:
                raise MemoryError(str(error)) from error
            raise DeviceFailed(str(error)) from error


class _Slot:
    """The buffers of one piece, as large on this side as on the device; they grow with the pieces."""

    def __init__(self, cupy: Any, memory: Any) -> None:
        self._cupy, self._memory = cupy, memory
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.drop()

    def drop(self) -> None:
        """Give the memory back: to the device's pool, and that of this machine at once."""
        self.input: Any = None
        self.output: Any = None
        self.sent: Bytes = np.empty(0, np.uint8)
        self.received: Bytes = np.empty(0, np.uint8)

    def reserve(self, input_bytes: int, output_bytes: int) -> None:
        """Have buffers of at least this size."""
        if self.sent.size < input_bytes:
            self.input, self.sent = None, np.empty(0, np.uint8)
            self.input, self.sent = self._memory.malloc(input_bytes), self._pinned(input_bytes)
        if self.received.size < output_bytes:
            self.output, self.received = None, np.empty(0, np.uint8)
            self.output, self.received = self._memory.malloc(output_bytes), self._pinned(output_bytes)

    def _pinned(self, nbytes: int) -> Bytes:
        """Of no pool: CuPy's rounds up to a power of two, and keeps what nobody uses for ever."""
        cuda = self._cupy.cuda
        memory = cuda.PinnedMemory(nbytes, cuda.runtime.hostAllocPortable)
        return np.frombuffer(cuda.PinnedMemoryPointer(memory, 0), np.uint8, nbytes)


@cache
def _cache_folder() -> Path:
    """Where compiled kernels are kept: with the user's other caches, or for this process if there is no home."""
    try:
        folder = Path.home() / ".cache" / "arrowquant"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="arrowquant-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="arrowquant-"))
