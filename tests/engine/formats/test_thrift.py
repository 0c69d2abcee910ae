"""What is written in Thrift's compact protocol reads back."""

from __future__ import annotations

import pytest

from service.engine.formats.thrift import BINARY, I32, STRUCT, CompactReader
from service.engine.formats.thrift_encode import Encoded, binary, i32, i64, list_of, struct

NUMBERS = (0, 1, -1, 63, 64, -64, -65, 300, (1 << 31) - 1, -(1 << 31))


@pytest.mark.parametrize("count", [0, 1, 14, 15, 200])
def test_a_structure_reads_back_as_it_was_written(count: int) -> None:
    numbers = [NUMBERS[i % len(NUMBERS)] for i in range(count)]
    inner = [struct({1: i64(n), 9: binary(b"x" * (n % 200))}) for n in range(count)]
    whole = struct({2: list_of(I32, [i32(n) for n in numbers]), 5: list_of(STRUCT, inner), 20: i64(-(1 << 63))})
    assert CompactReader(whole.data).struct() == {
        2: numbers,
        5: [{1: n, 9: b"x" * (n % 200)} for n in range(count)],
        20: -(1 << 63),
    }


def test_fields_that_are_taken_over_as_they_are_make_the_same_structure() -> None:
    whole = struct({1: i32(7), 4: list_of(BINARY, [binary(b"a"), binary("ö".encode())]), 6: struct({3: i64(1 << 40)})})
    fields = CompactReader(whole.data).raw_fields()
    assert struct({number: Encoded(*raw) for number, raw in fields.items()}) == whole
