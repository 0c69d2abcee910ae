"""One byte range of a file, after RFC 9110."""

from __future__ import annotations

import re

_RANGE = re.compile(r"bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})", re.IGNORECASE)


class Unsatisfiable(ValueError):
    """The range starts behind the end of the file."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Start and stop of the one range asked for, or None to send all.

    A malformed header and one that asks for several ranges are ignored, as the RFC allows. Raises
    Unsatisfiable when no byte of the range exists.
    """
    found = _RANGE.fullmatch((header or "").strip())
    if found is None or found[1] == found[2] == "":
        return None
    if found[1] == "":
        start, stop = max(0, size - int(found[2])), size
    else:
        start, last = int(found[1]), int(found[2] or size)
        if last < start and found[2]:
            return None
        stop = min(last + 1, size)
    if start >= stop:
        raise Unsatisfiable(f"bytes {start} to {stop} of {size}")
    return start, stop
