"""Writes the compact protocol of Thrift: values that know their kind, put together from the inside out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from service.engine.formats.thrift import BINARY, I32, I64, LIST, STRUCT

#: Lists longer than this say so in a number of their own.
SHORT_LIST = 14


class Encoded(NamedTuple):
    """A value as it stands in a buffer, and its kind, which stands before it."""

    kind: int
    data: bytes


def i32(value: int) -> Encoded:
    """An integer of 32 bits."""
    return Encoded(I32, varint(value << 1 ^ value >> 31))


def i64(value: int) -> Encoded:
    """An integer of 64 bits."""
    return Encoded(I64, varint(value << 1 ^ value >> 63))


def binary(value: bytes) -> Encoded:
    """Bytes, or a text in UTF-8."""
    return Encoded(BINARY, varint(len(value)) + value)


def list_of(kind: int, values: Sequence[Encoded]) -> Encoded:
    """A list of values of one kind."""
    head = bytes([len(values) << 4 | kind]) if len(values) <= SHORT_LIST else bytes([0xF0 | kind]) + varint(len(values))
    return Encoded(LIST, head + b"".join(value.data for value in values))


def struct(fields: Mapping[int, Encoded]) -> Encoded:
    """A structure; its fields by their numbers, in ascending order and no more than fifteen apart."""
    data, last = b"", 0
    for number, value in fields.items():
        data += bytes([(number - last) << 4 | value.kind]) + value.data
        last = number
    return Encoded(STRUCT, data + b"\0")


def varint(value: int) -> bytes:
    """A number without a sign, seven bits to a byte."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
