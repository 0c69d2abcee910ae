"""A piece of work for a device: which kernels run, on what, and where the results go; the same for every device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from service.engine.tensors import Array

#: The kernels' `Task`, of `kernels/common.cuh`.
TASK = np.dtype(
    [(name, np.uint64) for name in (
        "x", "y", "packed", "scale", "zero", "sums", "out", "counts", "remainders", "extremes", "starts",
        "parts", "coders", "finders",
    )]
    + [(name, np.int64) for name in ("rows", "cols", "row_bytes")]
    + [(name, np.int32) for name in ("group", "row_grids", "start_count", "symmetric", "scale_kind", "is_aligned")]
    + [(name, np.float32) for name in ("divisor", "top", "implied")]
    + [("finds", np.int32)]
)  # fmt: skip
#: Their `Part`: one of many small tensors.
PART = np.dtype(
    [(name, np.int64) for name in ("x", "packed", "grid")]
    + [(name, np.int32) for name in ("rows", "cols", "row_bytes", "row_grids", "is_aligned")]
    + [(name, np.uint32) for name in ("first_coder", "first_finder", "unused")]
)
#: Threads of a block of every kernel.
THREADS = 256
#: Where arrays begin in a buffer: at multiples of it.
ALIGNMENT = 256

Bytes = npt.NDArray[np.uint8]
#: Copies from the first array to the second.
Copy = Callable[[Bytes, Bytes], None]


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel of a source, `<source>.cu`, and how many blocks of it."""

    source: str
    kernel: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Work:
    """Launches in order over one task.

    inputs, outputs  by field of the task: contiguous arrays that are read, and that are filled
    numbers          the task's other fields
    clears           whether the outputs have to be zero before the first launch
    """

    launches: tuple[Launch, ...]
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    numbers: Mapping[str, float]
    clears: bool = False
    _offsets: dict[str, int] = field(init=False, default_factory=dict)
    _sizes: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        for arrays in (self.inputs, self.outputs):
            end = 0
            for name, array in arrays.items():
                self._offsets[name] = end
                end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
            self._sizes.append(end)

    @property
    def input_bytes(self) -> int:
        """Size of the buffer that the kernels read."""
        return self._sizes[0]

    @property
    def output_bytes(self) -> int:
        """Size of the buffer that the kernels write."""
        return self._sizes[1]

    def task(self, input_address: int, output_address: int) -> npt.NDArray[np.void]:
        """The task, (1,), for buffers at these addresses."""
        task = np.zeros(1, TASK)
        for name, value in self.numbers.items():
            task[name] = value
        for arrays, base in ((self.inputs, input_address), (self.outputs, output_address)):
            for name, array in arrays.items():
                task[name] = base + self._offsets[name] if array.nbytes else 0
        return task

    def fill(self, buffer: Bytes, copy: Copy = np.copyto) -> None:
        """Copy the inputs to where they belong in their buffer."""
        for name, array in self.inputs.items():
            start = self._offsets[name]
            copy(buffer[start : start + array.nbytes], as_bytes(array))

    def take(self, buffer: Bytes, copy: Copy = np.copyto) -> None:
        """Fill the outputs from what the kernels have written."""
        for name, array in self.outputs.items():
            start = self._offsets[name]
            copy(as_bytes(array), buffer[start : start + array.nbytes])


def as_bytes(array: Array) -> Bytes:
    """The bytes of a contiguous array, not copied."""
    return array.reshape(-1).view(np.uint8)
