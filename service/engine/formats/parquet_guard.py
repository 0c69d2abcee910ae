"""Looks at what a Parquet file claims before Arrow decodes it: Arrow allocates as it is told.

A page of a few bytes may stand for gigabytes: compressed, as a dictionary, or as repetitions. So the header of every
page is read here first. So is the footer: where its statistics contradict its schema, pyarrow's
`metadata.row_group(i).column(j)` ends the whole process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from service.engine.formats.thrift import CompactReader, Malformed, Struct

#: Reads so many bytes at an offset.
ReadAt = Callable[[int, int], bytes]

#: Bytes of the footer, which is read at a megabyte a second; the service's own has 1.5 KiB for each row group.
MAX_FOOTER_BYTES = 4 << 20
#: Nodes of the schema; the layout has 37.
MAX_NODES = 1000
#: Of a file. A row is a tensor, or 32 MiB of one.
MAX_ROWS = 1 << 18
MAX_ROW_GROUPS = 1 << 16
MAX_PAGES = 1 << 18
#: Elements of all lists in a row, on the average: `shape` has one for each dimension.
MAX_VALUES_PER_ROW = 64
#: Of these lists, which have one for each column of a matrix.
MAX_LONG_VALUES_PER_ROW = 1 << 20
LONG_LISTS = frozenset({"input_scale"})
#: What the pages of a row group may unpack to beside a multiple of their bytes in the file.
FREE_BYTES = 256 << 20
MAX_RATIO = 8
#: Read first of a header, and at most: statistics of long texts may stand in it.
HEADER_BYTES = 1 << 10
MAX_HEADER_BYTES = 16 << 20
#: Of a value beside what it says: its offset and its levels.
VALUE_BYTES = 16

MAGIC = b"PAR1"
TAIL_BYTES = 8

# Numbers in parquet.thrift.
_SCHEMA, _NUM_ROWS, _ROW_GROUPS = 2, 3, 4
_COLUMNS, _GROUP_ROWS = 1, 3
_COLUMN_META = 3
_PATH, _NUM_VALUES, _PACKED, _DATA_PAGE, _DICTIONARY_PAGE = 3, 5, 7, 9, 11
_PAGE_TYPE, _PAGE_UNPACKED, _PAGE_PACKED = 1, 2, 3
#: The header of a data page, of a dictionary and of a data page of the second version, each with these first.
_PAGE_HEADERS = {0: 5, 2: 7, 3: 8}
_VALUES, _ENCODING = 1, {0: 2, 3: 4}
_DICTIONARY_TYPE = 2
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8
_DICTIONARIES = (_PLAIN_DICTIONARY, _RLE_DICTIONARY)
#: Of the encodings that there are this one can repeat a long text in a byte or two.
_DELTA_BYTE_ARRAY = 7
#: By how much Arrow reads on behind a column that an old writer made.
_PADDING = 100


class Refused(ValueError):
    """The file claims more than is believed; the text says what."""


@dataclass(frozen=True, slots=True)
class Page:
    """What the header of a page says."""

    kind: int
    unpacked: int
    packed: int
    values: int
    encoding: int


def check_claims(read: ReadAt, size: int, columns: frozenset[str]) -> None:
    """Raise Refused unless the footer and all pages of these topmost columns are of a size that can be believed.

    `size` is that of the file. What is no Parquet at all is left to Arrow to refuse.
    """
    tail = read(size - TAIL_BYTES, TAIL_BYTES) if size >= TAIL_BYTES else b""
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or length > size - TAIL_BYTES:
        return
    if length > MAX_FOOTER_BYTES:
        raise Refused(f"its footer has {length} bytes; at most {MAX_FOOTER_BYTES} are read")
    try:
        footer = CompactReader(read(size - TAIL_BYTES - length, length)).struct()
        _check_footer(footer)
        budget = Budget(MAX_ROWS, MAX_PAGES)
        for group in footer[_ROW_GROUPS]:
            _check_group(read, size, group, columns, budget)
    except Malformed as error:
        raise Refused(f"a header cannot be read: {error}") from error
    except (TypeError, AttributeError, LookupError) as error:  # a field that is not there, or of another type
        raise Refused("a header does not have the fields that it should") from error


def _check_footer(footer: Struct) -> None:
    rows, groups, nodes = footer[_NUM_ROWS], len(footer[_ROW_GROUPS]), len(footer[_SCHEMA])
    if not 0 <= rows <= MAX_ROWS or groups > MAX_ROW_GROUPS or nodes > MAX_NODES:
        raise Refused(
            f"it claims {rows} rows, {groups} row groups and {nodes} nodes of a schema; at most {MAX_ROWS}, "
            f"{MAX_ROW_GROUPS} and {MAX_NODES} are read"
        )


@dataclass(slots=True)
class Budget:
    """How much a file may still claim."""

    rows: int
    pages: int


def _check_group(read: ReadAt, size: int, group: Struct, columns: frozenset[str], budget: Budget) -> None:
    """Arrow holds a row group in memory as a whole."""
    rows = group[_GROUP_ROWS]
    budget.rows -= rows
    if rows < 0 or budget.rows < 0:
        raise Refused(f"its row groups claim more than {MAX_ROWS} rows")
    unpacked = packed = 0
    for chunk in group[_COLUMNS]:
        column = chunk[_COLUMN_META]
        name = b".".join(column[_PATH]).decode(errors="replace")
        root = name.partition(".")[0]
        if root not in columns:
            continue
        max_values = (MAX_LONG_VALUES_PER_ROW if root in LONG_LISTS else MAX_VALUES_PER_ROW) * (rows + 1)
        column_bytes, column_packed, values = _sum(_pages(read, size, column, budget), name)
        if max(values, column[_NUM_VALUES]) > max_values:
            raise Refused(f"column {name!r:.80} claims {max(values, column[_NUM_VALUES])} values")
        unpacked, packed = unpacked + column_bytes, packed + column_packed
    if unpacked > FREE_BYTES + MAX_RATIO * packed:
        raise Refused(
            f"a row group of {packed} bytes may unpack to {unpacked}; more than {FREE_BYTES} + {MAX_RATIO} times its "
            "bytes are not read: write it without compression and dictionaries, or in smaller row groups"
        )


def _sum(pages: Iterator[Page], name: str) -> tuple[int, int, int]:
    """Bytes in memory at the most, bytes in the file, and values of a column."""
    unpacked = packed = values = dictionary = 0
    for page in pages:
        packed += page.packed
        unpacked += page.unpacked
        if page.kind == _DICTIONARY_TYPE:
            dictionary = page.unpacked
            continue
        values += page.values
        if page.encoding == _DELTA_BYTE_ARRAY:
            raise Refused(f"column {name!r:.80} has the encoding DELTA_BYTE_ARRAY, which is not read")
        # Each value may be the longest of the dictionary.
        unpacked += page.values * (dictionary if page.encoding in _DICTIONARIES else 0)
        unpacked += page.values * VALUE_BYTES
    return unpacked, packed, values


def _pages(read: ReadAt, size: int, column: Struct, budget: Budget) -> Iterator[Page]:
    # As Arrow does: from the dictionary on if that comes first, until all values have been seen.
    start, dictionary, seen = column[_DATA_PAGE], column.get(_DICTIONARY_PAGE, 0), 0
    position = dictionary if 0 < dictionary < start else start
    end = min(position + column[_PACKED] + _PADDING, size)
    while seen < column[_NUM_VALUES] and 0 <= position < end:
        header, length = _header(read, size, position)
        page = _page(header)
        budget.pages -= 1
        if budget.pages < 0:
            raise Refused(f"it has more than {MAX_PAGES} pages")
        yield page
        seen += page.values if page.kind != _DICTIONARY_TYPE else 0
        position += length + page.packed


def _page(header: Struct) -> Page:
    kind = header[_PAGE_TYPE]
    unpacked, packed = header[_PAGE_UNPACKED], header[_PAGE_PACKED]
    if unpacked < 0 or packed < 0:
        raise Refused("a page has a negative size")
    inner = header.get(_PAGE_HEADERS.get(kind, -1), {})
    values = inner.get(_VALUES, 0)
    if values < 0:
        raise Refused("a page has a negative number of values")
    return Page(kind, unpacked, packed, values, inner.get(_ENCODING.get(kind, 2), _PLAIN))


def _header(read: ReadAt, size: int, position: int) -> tuple[Struct, int]:
    """The header of a page, and its length."""
    length = HEADER_BYTES
    while True:
        there = min(length, size - position)
        reader = CompactReader(read(position, there))
        try:
            return reader.struct(), reader.position
        except Malformed:
            if there < length or length >= MAX_HEADER_BYTES:
                raise
            length *= 16
