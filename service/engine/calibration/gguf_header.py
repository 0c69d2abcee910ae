"""The header of a GGUF file, read as what it is: input that may be hostile."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from service.errors import CorruptModel
from service.storage.model_files import OpenFile

MAGIC = b"GGUF"
#: Of these the header has the same form.
VERSIONS = (2, 3)
#: Read of a file at most for its header.
MAX_HEADER_BYTES = 64 << 20
#: What llama.cpp allows.
MAX_DIMENSIONS = 4
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32
#: The types of values by number; of `string` and `array` the lengths stand before them.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
#: The number of float32 among the types of tensors.
F32 = 0


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of float32; `shape` as NumPy has it, the last dimension the fastest."""

    name: str
    shape: tuple[int, ...]
    offset: int  # in the file


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Values by key, but for arrays, whose items are not kept; tensors by name; and where the header ends."""

    values: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    nbytes: int


def read_gguf_header(file: OpenFile) -> GgufHeader:
    """Raises CorruptModel, also for tensors that are not of float32 or lie outside the file."""
    return _Header(file).parse()


class _Header:
    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._raw = file.read(0, min(file.size, MAX_HEADER_BYTES)).tobytes()
        self._at = 0

    def parse(self) -> GgufHeader:
        if self._raw[:4] != MAGIC:
            self._corrupt("it does not begin with GGUF")
        self._at = 4
        version, tensor_count, value_count = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in VERSIONS:
            self._corrupt(f"it is of version {version}; readable are {', '.join(map(str, VERSIONS))}")
        values = dict(self._key_value() for _ in range(value_count))
        found = [self._tensor() for _ in range(tensor_count)]
        alignment = values.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            self._corrupt(f"{ALIGNMENT_KEY} is {alignment!r:.80}")
        start = -(-self._at // alignment) * alignment
        tensors = {t.name: GgufTensor(t.name, t.shape, start + t.offset) for t in found}
        for tensor in tensors.values():
            if tensor.offset + 4 * prod(tensor.shape) > self._file.size:
                self._corrupt(f"tensor {tensor.name!r:.200} ends behind the end of the file")
        return GgufHeader(values, tensors, self._at)

    def _key_value(self) -> tuple[str, Any]:
        return self._string(), self._value(self._scalar("I"))

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, count = self._scalar("I"), self._scalar("Q")
            if inner in SCALARS:
                self._take(count * struct.calcsize(SCALARS[inner]))
                return None
            if inner != STRING:
                self._corrupt(f"it has an array of the type {inner}")
            for _ in range(count):
                self._string()
            return None
        if kind not in SCALARS:
            self._corrupt(f"it has a value of the unknown type {kind}")
        return self._scalar(SCALARS[kind])

    def _tensor(self) -> GgufTensor:
        name, dimensions = self._string(), self._scalar("I")
        if dimensions > MAX_DIMENSIONS:
            self._corrupt(f"tensor {name!r:.200} has {dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))
        kind, offset = self._scalar("I"), self._scalar("Q")
        if kind != F32:
            self._corrupt(f"tensor {name!r:.200} is of type {kind}, and not of float32")
        return GgufTensor(name, shape[::-1], offset)

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8", errors="replace")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _take(self, count: int) -> bytes:
        if count > len(self._raw) - self._at:
            self._corrupt(f"its header goes on behind its end, or behind {MAX_HEADER_BYTES} bytes")
        self._at += count
        return self._raw[self._at - count : self._at]

    def _corrupt(self, what: str) -> NoReturn:
        raise CorruptModel(f"{self._file.name} is damaged: {what}. Fetch the file again.")
