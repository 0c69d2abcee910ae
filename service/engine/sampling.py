"""Some rows of a tensor that stand for all of them."""

from __future__ import annotations

#: Pieces that a sample is made of, evenly spread.
PIECES = 16


def spread(rows: int, count: int) -> list[tuple[int, int]]:
    """(start, stop) of pieces, at equal distances, of about `count` of so many rows; of all where they are fewer."""
    if rows <= count:
        return [(0, rows)]
    pieces = min(count, PIECES)
    height = count // pieces
    last = rows - height
    return [(at, at + height) for at in (last * piece // max(1, pieces - 1) for piece in range(pieces))]
