"""Cells go from a spool into pages of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

from service.engine.formats.append_file import AppendFile
from service.engine.formats.parquet_pages import PREFIX_BYTES, page_head, prefix
from service.engine.formats.parquet_rows import Row

#: Of the cells in one page, when there are several.
PAGE_BYTES = 1 << 20


def pages(rows: Sequence[Row], column: int) -> Iterator[list[Row]]:
    """Rows whose cells of one of BYTE_COLUMNS make up a page: one large cell alone, or several of up to PAGE_BYTES."""
    page: list[Row] = []
    size = 0
    for row in rows:
        if page and size + row.sizes[column] > PAGE_BYTES:
            yield page
            page, size = [], 0
        page.append(row)
        size += row.sizes[column]
    if page:
        yield page


def write_page(sink: AppendFile, spool: AppendFile, column: int, rows: Sequence[Row], at: int) -> int:
    """Write a page of cells that lie in the spool from `at` on; where they end there."""
    present = [row.has(column) for row in rows]
    sizes = [row.sizes[column] for row in rows]
    ends = list(accumulate(sizes, initial=at))
    sink.write(page_head(present, sum(sizes) + PREFIX_BYTES * sum(present)))
    if len(rows) == 1 and present[0]:  # it may be large
        sink.write(prefix(sizes[0]))
        for start in range(at, ends[-1], PAGE_BYTES):
            sink.write(spool.read(start, min(start + PAGE_BYTES, ends[-1])))
    else:
        cells = memoryview(spool.read(at, ends[-1]))
        named = zip(ends, sizes, present, strict=False)
        parts = [(prefix(size), cells[start - at : start - at + size]) for start, size, there in named if there]
        sink.write(b"".join(chain.from_iterable(parts)))
    return ends[-1]
