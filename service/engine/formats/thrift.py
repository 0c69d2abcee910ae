"""Reads the compact protocol of Thrift, in which Parquet writes its footer and its page headers, into plain values."""

from __future__ import annotations

from typing import Any

#: Parquet's own structures are nested less deep.
MAX_DEPTH = 16
#: Of all structures that are read from one buffer together.
MAX_VALUES = 1_000_000

_TRUE, _FALSE, _BYTE, _I16, I32, I64, _DOUBLE, BINARY, LIST, _SET, _MAP, STRUCT = range(1, 13)
_INTEGERS = frozenset({_I16, I32, I64})

#: A structure: values by the numbers of their fields.
Struct = dict[int, Any]


class Malformed(ValueError):
    """These bytes are no structure of the compact protocol."""


class CompactReader:
    """Reads structures that follow each other in a buffer."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._values = 0
        #: Bytes read so far.
        self.position = 0

    def struct(self) -> Struct:
        """The next structure; raises Malformed, also where the bytes end before it does."""
        try:
            return self._struct(0)
        except IndexError as error:
            raise Malformed("it ends too early") from error

    def raw_fields(self) -> dict[int, tuple[int, bytes]]:
        """The next structure as (kind, bytes) by the numbers of its fields; no truths among them. For own bytes."""
        fields = {}
        number = 0
        while header := self._byte():
            number += header >> 4
            start = self.position
            self._value(header & 15, 0)
            fields[number] = header & 15, self._data[start : self.position]
        return fields

    def _struct(self, depth: int) -> Struct:
        if depth > MAX_DEPTH:
            raise Malformed(f"structures are nested more than {MAX_DEPTH} deep")
        fields: Struct = {}
        number = 0
        while header := self._byte():
            delta, kind = header >> 4, header & 15
            number = number + delta if delta else self._zigzag()
            if number in fields:
                raise Malformed(f"field {number} is there twice")
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise Malformed(f"there are more than {MAX_VALUES} values")
        if kind in _INTEGERS:
            return self._zigzag()
        if kind == BINARY:
            return self._bytes(self._varint())
        if kind == STRUCT:
            return self._struct(depth + 1)
        if kind in (LIST, _SET):
            return self._list(depth + 1)
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind == _DOUBLE:
            return self._bytes(8)
        raise Malformed(f"there is no type {kind}" if kind != _MAP else "Parquet has no maps")

    def _list(self, depth: int) -> list[Any]:
        if depth > MAX_DEPTH:
            raise Malformed(f"lists are nested more than {MAX_DEPTH} deep")
        header = self._byte()
        size = header >> 4
        if size == 15:
            size = self._varint()
        # Each element takes a byte at least, so that what is claimed costs nothing before it is there.
        if size > len(self._data) - self.position:
            raise Malformed(f"a list claims {size} elements")
        return [self._value(header & 15, depth) for _ in range(size)]

    def _byte(self) -> int:
        self.position += 1
        return self._data[self.position - 1]

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self.position:
            raise Malformed(f"a text claims {count} bytes")
        self.position += count
        return self._data[self.position - count : self.position]

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        data, position = self._data, self.position
        value = byte = data[position]
        shift = 0
        while byte > 127:
            position, shift = position + 1, shift + 7
            if shift > 63:
                raise Malformed("a number takes more than ten bytes")
            byte = data[position]
            value += (byte - 1) << shift
        self.position = position + 1
        return value
