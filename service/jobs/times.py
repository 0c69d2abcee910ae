"""Times as the database has them: texts that sort as the times do.

Earlier versions left the microseconds out where there were none, in some columns. Such a text sorts before all others
of its second, which is right: nothing has to be rewritten.
"""

from __future__ import annotations

from datetime import UTC, datetime


def text_of(time: datetime) -> str:
    """A time in UTC, to the microsecond."""
    return in_utc(time).isoformat(timespec="microseconds")


def now_text() -> str:
    """This moment."""
    return text_of(datetime.now(UTC))


def time_of(text: str | None) -> datetime | None:
    """The inverse of `text_of`, also where there is no time."""
    return datetime.fromisoformat(text) if text else None


def in_utc(time: datetime) -> datetime:
    """The same time in UTC, or next to it at the ends of the calendar."""
    try:
        return time.astimezone(UTC)
    except OverflowError:
        # Within a day of either end of the calendar the time in UTC may lie beyond it.
        return time.replace(tzinfo=UTC)
