"""Calibration as llama.cpp writes it: an importance matrix, `imatrix.gguf`, whose sums of squares are mean squares."""

from __future__ import annotations

import numpy as np

from service.engine.calibration.entries import CalibrationFile, Entry
from service.engine.calibration.gguf_header import GgufTensor, read_gguf_header
from service.engine.tensors import Array, FloatArray
from service.errors import InvalidCalibration
from service.storage.model_files import OpenFile

#: Of a tensor: the sum of the squares of each input, and of how many inputs; [matrices, inputs] and [matrices, 1].
SUMS, COUNTS = ".in_sum2", ".counts"
TYPE_KEY, TYPE = "general.type", "imatrix"


class ImatrixCalibration(CalibrationFile):
    """One step, a `mean_square` for each layer; experts, which share a tensor in GGUF files, are left out."""

    has_gguf_names = True

    def __init__(self, source: OpenFile) -> None:
        super().__init__(source)
        header = read_gguf_header(source)
        if header.values.get(TYPE_KEY) != TYPE:
            raise InvalidCalibration(f"{source.name} is no importance matrix: its {TYPE_KEY} is not {TYPE!r}")
        self._tensors = header.tensors
        self.header = source.read(0, header.nbytes).tobytes()
        self.shared = {}
        self.entries = {entry.name: entry for name in header.tensors if (entry := self._entry(name))}

    def read(self, entry: Entry, start: int, stop: int) -> Array:
        """See `CalibrationFile.read`."""
        tensor = f"{entry.name.removesuffix('.mean_square')}.weight"
        sums, count = self._read(self._tensors[tensor + SUMS]), self._read(self._tensors[tensor + COUNTS])
        if not count[0] > 0:
            raise InvalidCalibration(f"{tensor} in {self.source.name} was never fed: its count is {count[0]}")
        with np.errstate(over="ignore"):  # an infinity is refused
            squares: FloatArray = (sums / count[0]).reshape(entry.shape)
        return squares[start:stop]

    def _entry(self, name: str) -> Entry | None:
        tensor = name.removesuffix(SUMS)
        if tensor == name or not tensor.endswith(".weight"):
            return None
        shape, counts = self._tensors[name].shape, self._tensors.get(tensor + COUNTS)
        columns = shape[-1] if shape else 0
        if counts is None or not columns or np.prod(shape) != columns or np.prod(counts.shape) != 1:
            return None
        return Entry(f"{tensor.removesuffix('.weight')}.mean_square", "F32", (1, columns))

    def _read(self, tensor: GgufTensor) -> FloatArray:
        data = self.source.read(tensor.offset, 4 * int(np.prod(tensor.shape)))
        return data.view(np.float32)
