"""Threads for calls that may wait for a store, apart from all others: one that hangs holds up none that needs none."""

from __future__ import annotations

from service.errors import StoreUnavailable
from service.jobs.limited_threads import LimitedThreads


def store_threads(places: int) -> LimitedThreads:
    """So many calls at once; StoreUnavailable when all of them wait already."""
    return LimitedThreads(places, "store-wait", _all_wait)


def _all_wait() -> StoreUnavailable:
    return StoreUnavailable(
        "as many calls as this server makes at once wait for a store already: try again when it is well"
    )
