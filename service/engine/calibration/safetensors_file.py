"""Calibration in a safetensors file."""

from __future__ import annotations

from service.engine.calibration.entries import (
    NUMBER_DTYPES,
    SHARED,
    CalibrationFile,
    Entry,
    checked_entry,
    parse_shared,
)
from service.engine.formats.safetensors_header import read_header
from service.engine.tensors import Array
from service.storage.model_files import OpenFile


class SafetensorsCalibration(CalibrationFile):
    """Entries are its tensors."""

    def __init__(self, source: OpenFile) -> None:
        super().__init__(source)
        header = read_header(source)
        file = str(source.name)
        self.header = header.json
        self.entries = {t.name: checked_entry(t.name, t.dtype, t.shape, file) for t in header.tensors}
        self.shared = parse_shared(header.metadata.get(SHARED), file)
        self._offsets = {t.name: t.offset for t in header.tensors}

    def read(self, entry: Entry, start: int, stop: int) -> Array:
        """See `CalibrationFile.read`."""
        width = entry.nbytes // max(1, entry.rows)
        data = self.source.read(self._offsets[entry.name] + start * width, (stop - start) * width)
        return data.view(NUMBER_DTYPES[entry.dtype]).reshape(stop - start, *entry.shape[1:])
