"""What CuPy needs a driver for, made of fibers: device memory, streams and launches; all else is CuPy's own.

Nothing that is queued in a stream happens before somebody waits for it, so whoever reads too early finds poison.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cupy
import numpy as np

from service.engine.backends.work import ALIGNMENT, THREADS
from tests.engine.backends.fiber_device import POISON, library

RuntimeFault = cupy.cuda.runtime.CUDARuntimeError
#: What `cudaGetErrorName` calls cudaErrorIllegalAddress, and cudaErrorMemoryAllocation.
ILLEGAL_ADDRESS, MEMORY_ALLOCATION = 700, 2


class FiberCuda:
    """Stands where `cupy` is imported. `log` has every operation in its order: what, and the number of the stream."""

    def __init__(self, devices: int = 1, pinned_bytes: int = 1 << 40) -> None:
        self.log: list[tuple[str, int]] = []
        self.pinned_bytes, self.pinned_limit = 0, pinned_bytes
        self.failing: set[int] = set()  # devices that have fallen off the bus
        self.fails_when_full = False
        self.pools: list[_MemoryPool] = []
        self.state = threading.local()
        cupy.cuda.nvrtc.getVersion()  # loads the compiler, for which CuPy imports itself
        self.numbers = itertools.count()
        cuda = self

        class Device(_Device):
            owner = cuda

        class Stream(_Stream):
            owner = cuda

        class MemoryPool(_MemoryPool):
            owner = cuda

        class PinnedMemory(_PinnedMemory):
            owner = cuda

        self.cuda = SimpleNamespace(
            Event=_Event,
            get_elapsed_time=lambda begin, end: (end.time - begin.time) * 1e3,
            Device=Device,
            Stream=Stream,
            MemoryPool=MemoryPool,
            PinnedMemory=PinnedMemory,
            PinnedMemoryPointer=cupy.cuda.PinnedMemoryPointer,
            nvrtc=cupy.cuda.nvrtc,
            driver=cupy.cuda.driver,
            runtime=SimpleNamespace(
                getDeviceCount=lambda: devices,
                getDeviceProperties=lambda _: {"name": b"Fibers"},
                hostAllocPortable=cupy.cuda.runtime.hostAllocPortable,
                CUDARuntimeError=RuntimeFault,
            ),
        )

    def RawModule(self, *, path: str) -> _Module:
        """See `cupy.RawModule`."""
        return _Module(self, Path(path))

    def current(self) -> tuple[int, _Stream]:
        """The device and the stream of this thread."""
        return self.state.devices[-1], self.state.streams[-1]

    def check(self, device: int) -> None:
        """What every call does to a device that is gone."""
        if device in self.failing:
            raise RuntimeFault(ILLEGAL_ADDRESS)


class _Device:
    owner: FiberCuda

    def __init__(self, device: int) -> None:
        self.id, self.compute_capability, self.pci_bus_id = device, "90", f"0000:{device:02}:00.0"

    def __enter__(self) -> None:
        self.owner.state.devices = [*getattr(self.owner.state, "devices", []), self.id]

    def __exit__(self, *_: object) -> None:
        self.owner.state.devices.pop()


class _Stream:
    owner: FiberCuda

    def __init__(self, *, non_blocking: bool) -> None:
        assert non_blocking, "others wait for the default stream"
        self.device_id, self.number = self.owner.state.devices[-1], next(self.owner.numbers)
        self.queued: list[Callable[[], object]] = []

    def __enter__(self) -> None:
        assert self.owner.state.devices[-1] == self.device_id, "CuPy refuses a stream of another device"
        self.owner.state.streams = [*getattr(self.owner.state, "streams", []), self]

    def __exit__(self, *_: object) -> None:
        self.owner.state.streams.pop()

    def put(self, what: str, call: Callable[[], object]) -> None:
        """Queue an operation."""
        self.owner.check(self.device_id)
        self.owner.log.append((what, self.number))
        self.queued.append(call)

    def synchronize(self) -> None:
        """See `cupy.cuda.Stream.synchronize`."""
        self.owner.check(self.device_id)
        self.owner.log.append(("wait", self.number))
        calls, self.queued = self.queued, []
        for call in calls:
            call()


class _Event:
    time = 0.0

    def record(self, stream: _Stream) -> None:
        """See `cupy.cuda.Event.record`."""
        self.stream = stream
        stream.put("event", lambda: setattr(self, "time", time.perf_counter()))

    def synchronize(self) -> None:
        """See `cupy.cuda.Event.synchronize`."""
        self.stream.synchronize()


class _MemoryPool:
    owner: FiberCuda

    def __init__(self) -> None:
        self.limit, self.used = 0, 0
        self.owner.pools.append(self)

    def set_limit(self, size: int) -> None:
        """See `cupy.cuda.MemoryPool.set_limit`."""
        self.limit = size

    def malloc(self, size: int) -> _MemoryPointer:
        """See `cupy.cuda.MemoryPool.malloc`."""
        device, _ = self.owner.current()
        self.owner.check(device)
        if self.limit and self.used + size > self.limit:
            if self.owner.fails_when_full:
                self.owner.failing.add(device)
            raise cupy.cuda.memory.OutOfMemoryError(size, self.used, self.limit)
        return _MemoryPointer(self, size)

    def free_all_blocks(self) -> None:
        """See `cupy.cuda.MemoryPool.free_all_blocks`; here nothing is kept."""


class _MemoryPointer:
    def __init__(self, pool: _MemoryPool, size: int) -> None:
        self.pool, self.size = pool, size
        pool.used += size
        memory = np.full(size + ALIGNMENT, POISON, np.uint8)
        self.bytes = memory[-memory.ctypes.data % ALIGNMENT :][:size]
        self.ptr = self.bytes.ctypes.data

    def __del__(self) -> None:
        self.pool.used -= self.size

    def copy_from_host_async(self, mem: ctypes.c_void_p, size: int) -> None:
        """See `cupy.cuda.MemoryPointer.copy_from_host_async`."""
        _, stream = self.pool.owner.current()
        stream.put("upload", lambda: ctypes.memmove(self.ptr, mem.value, size))

    def copy_to_host_async(self, mem: ctypes.c_void_p, size: int) -> None:
        """See `cupy.cuda.MemoryPointer.copy_to_host_async`."""
        _, stream = self.pool.owner.current()
        stream.put("download", lambda: ctypes.memmove(mem.value, self.ptr, size))

    def copy_from_device_async(self, src: _MemoryPointer, size: int) -> None:
        """See `cupy.cuda.MemoryPointer.copy_from_device_async`."""
        _, stream = self.pool.owner.current()
        stream.put("copy", lambda: ctypes.memmove(self.ptr, src.ptr, size))

    def memset_async(self, value: int, size: int) -> None:
        """See `cupy.cuda.MemoryPointer.memset_async`."""
        _, stream = self.pool.owner.current()
        stream.put("clear", lambda: ctypes.memset(self.ptr, value, size))


class _PinnedMemory:
    owner: FiberCuda

    def __init__(self, size: int, flags: int) -> None:
        assert flags == cupy.cuda.runtime.hostAllocPortable
        if self.owner.pinned_bytes + size > self.owner.pinned_limit:
            raise RuntimeFault(MEMORY_ALLOCATION)
        self.size, self.memory = size, np.full(size, POISON, np.uint8)
        self.owner.pinned_bytes += size
        self.ptr = self.memory.ctypes.data

    def __del__(self) -> None:
        if hasattr(self, "memory"):
            self.owner.pinned_bytes -= self.size


class _Module:
    """A CUBIN, whose kernels the fibers run instead."""

    def __init__(self, owner: FiberCuda, path: Path) -> None:
        self.owner, self.source, self.cubin = owner, path.name.split(".")[0], path.read_bytes()
        assert self.cubin.startswith(b"\x7fELF")

    def get_function(self, name: str) -> Callable[[tuple[int], tuple[int], tuple[np.ndarray]], None]:
        """See `cupy.RawModule.get_function`."""
        assert f".text.{name}\0".encode() in self.cubin, f"{self.source} has no kernel {name}"
        loaded = library(self.source)

        def launch(grid: tuple[int], block: tuple[int], args: tuple[np.ndarray]) -> None:
            (task,) = args
            assert task.size == 1, "CuPy passes nothing else by value"
            assert block == (THREADS,)
            passed = task.copy()  # as CUDA does it
            _, stream = self.owner.current()
            run = getattr(loaded, name)
            stream.put("kernel", lambda: loaded.launch(run, grid[0], THREADS, passed.ctypes.data))

        return launch
