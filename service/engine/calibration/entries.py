"""What a file of calibration is: named arrays, of which headers are read at once and data a piece at a time."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from service.engine.tensors import Array
from service.errors import InvalidCalibration
from service.storage.model_files import OpenFile

#: Numbers that a file may hold, by their safetensors names.
NUMBER_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
#: Where the metadata says which layers are fed what others are: a JSON object from the name of a layer to another's.
SHARED = "arrowquant.shared"


@dataclass(frozen=True, slots=True)
class Entry:
    """An array as the header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Its first dimension; 1 where it has none."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes as it is stored."""
        return prod(self.shape) * NUMBER_DTYPES[self.dtype].itemsize


class CalibrationFile(ABC):
    """An open file of calibration. Reads raise what `OpenFile.read` raises, and InvalidCalibration or CorruptModel."""

    #: By name.
    entries: Mapping[str, Entry]
    #: From a layer to the one whose entries are also its own.
    shared: Mapping[str, str]
    #: The header as it lies in the file, or what stands for it.
    header: bytes
    #: Names of layers are those that GGUF files have.
    has_gguf_names: bool = False

    def __init__(self, source: OpenFile) -> None:
        self.source = source

    @abstractmethod
    def read(self, entry: Entry, start: int, stop: int) -> Array:
        """Rows start to stop of an entry, in its dtype and with its other dimensions."""

    def held_bytes(self, entry: Entry) -> int:
        """What a read of it may hold beside what it returns."""
        del entry
        return 0

    def whole(self, entry: Entry) -> Array:
        """All of an entry."""
        return self.read(entry, 0, entry.rows).reshape(entry.shape)

    def close(self) -> None:
        """Let go of the file."""
        self.source.close()


def checked_entry(name: str, dtype: str, shape: tuple[int, ...], file: str) -> Entry:
    """The entry; raises InvalidCalibration for what are no numbers that can be read."""
    if dtype not in NUMBER_DTYPES:
        raise InvalidCalibration(f"{name!r} in {file} has the dtype {dtype!r}; readable are {', '.join(NUMBER_DTYPES)}")
    return Entry(name, dtype, shape)


def parse_shared(text: str | None, file: str) -> dict[str, str]:
    """What the metadata says under SHARED; raises InvalidCalibration."""
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError) as error:
        raise InvalidCalibration(f"{SHARED!r} in the metadata of {file} is not JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(other, str) for other in found.values()):
        raise InvalidCalibration(f"{SHARED!r} in the metadata of {file} is not an object from layer to layer")
    return found
