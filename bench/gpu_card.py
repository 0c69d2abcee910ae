"""A CUDA device as measurements need it: time between events, copies, launches, and the energy that is counted."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.common import GB, Samples
from service.engine.backends.cupy_device import CupyDevice
from service.engine.backends.work import THREADS, Work

#: Joules are counted in steps of some tens of milliseconds.
ENERGY_S = 1.0


@dataclass(frozen=True, slots=True)
class Rates:
    """GB/s: of a copy on the card, of both its sides; and of what comes from pinned memory, and goes there."""

    copy: float
    upload: float
    download: float


class Card:
    """The first CUDA device."""

    def __init__(self, threads: int, management_library: str = "libnvidia-ml.so.1") -> None:
        """`management_library` is what counts energy."""
        import cupy

        self._cuda = cupy.cuda
        self.device = CupyDevice(0, 0, threads)
        self.name = self.device.name
        self._card = self._cuda.Device(0)
        self._meter = EnergyMeter.of(self._card.pci_bus_id, management_library)
        with self._card:
            self._stream = self._cuda.Stream(non_blocking=True)
            self._memory = self._cuda.MemoryPool()

    def seconds(self, launch: Callable[[], object], repeats: int) -> Samples:
        """Between two events around what `launch` queues."""
        times, warm_up = [], min(3, repeats)
        with self._card, self._stream:
            for turn in range(repeats + warm_up):
                begin, end = self._cuda.Event(), self._cuda.Event()
                begin.record(self._stream)
                launch()
                end.record(self._stream)
                end.synchronize()
                if turn >= warm_up:
                    times.append(self._cuda.get_elapsed_time(begin, end) / 1e3)
        return Samples(tuple(times))

    def rates(self, nbytes: int, repeats: int) -> Rates:
        """Of so many bytes."""
        with self._card, self._stream:
            a, b = self._memory.malloc(nbytes), self._memory.malloc(nbytes)
            pinned = self._cuda.PinnedMemory(nbytes, self._cuda.runtime.hostAllocPortable)
        address = ctypes.c_void_p(pinned.ptr)
        a_to_b = self.seconds(lambda: b.copy_from_device_async(a, nbytes), repeats)
        up = self.seconds(lambda: a.copy_from_host_async(address, nbytes), repeats)
        down = self.seconds(lambda: a.copy_to_host_async(address, nbytes), repeats)
        return Rates(*(factor * nbytes / s.median / GB for factor, s in ((2, a_to_b), (1, up), (1, down))))

    def launched(self, work: Work, repeats: int) -> Samples:
        """A piece of work whose inputs are on the card."""
        host = np.empty(work.input_bytes, np.uint8)
        work.fill(host)
        with self._card, self._stream:
            read, written = self._memory.malloc(work.input_bytes), self._memory.malloc(work.output_bytes)
            read.copy_from_host_async(ctypes.c_void_p(host.ctypes.data), host.nbytes)
            if work.clears:
                written.memset_async(0, work.output_bytes)
            self._stream.synchronize()
            kernels = [(self.device.kernel(one.source, one.kernel), one.blocks) for one in work.launches]
        task = work.task(read.ptr, written.ptr)

        def launch() -> None:
            for kernel, blocks in kernels:
                kernel((blocks,), (THREADS,), (task,))

        return self.seconds(launch, repeats)

    def joules(self, call: Callable[[], object], least_s: float = ENERGY_S) -> float | None:
        """Of one call, over as many as take `least_s`; None where the driver does not tell."""
        if self._meter is None:
            return None
        begun, before, calls = time.perf_counter(), self._meter.joules(), 0
        while time.perf_counter() - begun < least_s:
            call()
            calls += 1
        return (self._meter.joules() - before) / calls


class EnergyMeter:
    """What NVIDIA's management library counts of one card."""

    def __init__(self, library: Any, card: ctypes.c_void_p) -> None:
        self._library, self._card = library, card

    @classmethod
    def of(cls, pci_bus_id: str, library: str) -> EnergyMeter | None:
        """The meter of a card, or None where there is no library, or it does not count."""
        try:
            loaded = ctypes.CDLL(library)
        except OSError:
            return None
        card = ctypes.c_void_p()
        found = loaded.nvmlInit_v2() or loaded.nvmlDeviceGetHandleByPciBusId_v2(pci_bus_id.encode(), ctypes.byref(card))
        return None if found or _millijoules(loaded, card) is None else cls(loaded, card)

    def joules(self) -> float:
        """Since the driver was loaded."""
        return (_millijoules(self._library, self._card) or 0) / 1e3


def _millijoules(library: Any, card: ctypes.c_void_p) -> int | None:
    count = ctypes.c_ulonglong()
    return None if library.nvmlDeviceGetTotalEnergyConsumption(card, ctypes.byref(count)) else count.value
