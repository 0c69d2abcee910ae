"""Calls made in another thread: in their order, none behind one that failed, never too many waiting."""

from __future__ import annotations

import threading

import pytest

from service.engine.clock import Clock
from service.engine.write_behind import WAITING_BYTES, WORTHWHILE_BYTES, WriteBehind


def nothing() -> None:
    pass


def wait_for(event: threading.Event) -> None:
    assert event.wait(60)


def test_calls_are_made_in_their_order_by_one_other_thread() -> None:
    behind = WriteBehind(Clock())
    made: list[tuple[int, int]] = []
    for number in range(1000):
        behind.put(lambda n=number: made.append((n, threading.get_ident())), number % 7 * WORTHWHILE_BYTES // 5)
    behind.settle()
    assert [n for n, _ in made] == list(range(1000))
    assert len({thread for _, thread in made} - {threading.get_ident()}) == 1
    behind.close(nothing)


def test_behind_a_call_that_failed_none_is_made_and_its_error_is_raised_where_the_next_is_asked_for() -> None:
    behind = WriteBehind(Clock())
    made: list[str] = []

    def fail() -> None:
        raise OSError("full")

    behind.put(lambda: made.append("before"))
    behind.put(fail, WORTHWHILE_BYTES)
    behind.put(lambda: made.append("behind"))
    with pytest.raises(OSError, match="full"):
        behind.settle()
    behind.close(lambda: made.append("last"))
    assert made == ["before"]


def test_what_waits_when_it_is_closed_is_made_and_a_last_call_behind_it() -> None:
    behind = WriteBehind(Clock())
    made: list[str] = []
    behind.put(lambda: made.append("waiting"))
    behind.close(lambda: made.append("last"))
    assert made == ["waiting", "last"]


def test_it_holds_no_more_than_a_few_pieces_while_the_writing_stands_still() -> None:
    behind = WriteBehind(Clock())
    ready = threading.Event()
    threading.Timer(0.1, ready.set).start()
    held = 0
    for _ in range(20):
        behind.put(lambda: wait_for(ready), WAITING_BYTES // 3)
        held += not ready.is_set()
    behind.settle()
    behind.close(nothing)
    assert held <= 3


def test_time_spent_waiting_is_told_as_writing() -> None:
    clock = Clock()
    behind = WriteBehind(clock)
    ready = threading.Event()
    behind.put(lambda: wait_for(ready), WORTHWHILE_BYTES)
    threading.Timer(0.05, ready.set).start()
    behind.settle()
    behind.close(nothing)
    assert clock.here.seconds["write"] > 0.02
