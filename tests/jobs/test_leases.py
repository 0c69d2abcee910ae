"""Leases: what is held is known to be, and what waits for it is done once."""

from __future__ import annotations

from service.jobs.leases import Leases


def test_what_is_held_twice_is_free_after_both_have_let_go() -> None:
    leases, done = Leases(), []
    leases.take("a", "b")
    with leases.held("a"):
        leases.when_free("a", lambda: done.append("a"))
        assert leases.taken() == {"a", "b"}
    assert done == []
    leases.give_back("a", "b")
    assert done == ["a"]
    assert leases.taken() == frozenset()


def test_what_nobody_holds_is_done_at_once_and_what_was_done_is_not_done_again() -> None:
    leases, done = Leases(), []
    leases.when_free("a", lambda: done.append(1))
    with leases.held("a", "a"):
        leases.when_free("a", lambda: done.append(2))
        leases.when_free("a", lambda: done.append(3))
    with leases.held("a"):
        pass
    assert done == [1, 3]
