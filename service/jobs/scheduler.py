"""Who runs next, and who makes room: lanes of devices, the order of claims, and the memory that all share.

A job that has had its turn while another one has the better claim is asked to leave its lane, which it does between
two tensors; it then waits like any other. A job whose memory is not free is passed over by those that fit beside
what runs, but not for long: then what it needs is kept for it, as soon as those that go before it leave so much.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

from service.jobs.lanes import Lanes, Turn
from service.jobs.memory_ledger import MemoryLedger
from service.jobs.waiting import Claim

#: A job that could not have the memory it needs, although it was its turn, is passed over for so long.
PASSED_OVER_S = 10.0
#: So many that lack memory are passed over by one that does not.
MAX_PASSED_OVER = 64


class Scheduler:
    """Hands waiting jobs to free lanes; everything on one thread."""

    def __init__(
        self,
        lanes: Mapping[str, int],
        memory: MemoryLedger,
        start: Callable[[Claim], None],
        park: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`lanes` are how many each device has.

        `start` is called when a lane is free for a job; `park` asks it to leave, which is to be told by `left`.
        Neither may wait, or call this object back.
        """
        self._lanes = {device: Lanes(count) for device, count in lanes.items()}
        self._memory = memory
        self._start = start
        self._park = park
        self._clock = clock
        self._arrivals = 0
        self._devices: dict[str, str] = {}  # of each job that waits or runs
        self._blocked_since: dict[str, float] = {}
        self._overdue: Claim | None = None
        #: Whether jobs are started.
        self.is_open = False

    @property
    def depth(self) -> int:
        """How many jobs wait, those among them that have had a turn."""
        return sum(len(lanes.waiting) for lanes in self._lanes.values())

    @property
    def running(self) -> int:
        """How many jobs are in a lane."""
        return sum(len(lanes.turns) for lanes in self._lanes.values())

    def depth_of(self, tenant: str) -> int:
        """How many jobs of a tenant wait."""
        return sum(lanes.waiting.count(tenant) for lanes in self._lanes.values())

    def waits(self, job_id: str) -> bool:
        """Whether a job waits for a turn."""
        return job_id in self._devices and job_id in self._of(job_id).waiting

    def ahead_of(self, tenant: str, priority: int, device: str) -> int:
        """How many of the waiting would have their turn before a job that came now, if nothing else came."""
        return self._lanes[device].waiting.ahead_of(tenant, priority)

    def put(
        self, job_id: str, tenant: str, priority: int, device: str, memory_bytes: int, service_s: float = 0.0
    ) -> None:
        """Queue a job. Of one that was served before, by an earlier server, say how long."""
        self._arrivals += 1
        # What can never be given is judged by the run, which knows it better.
        memory_bytes = min(memory_bytes, self._memory.limit_bytes)
        self._wait(Claim(job_id, tenant, self._arrivals, priority, device, memory_bytes, service_s))
        self.look()

    def remove(self, job_id: str) -> bool:
        """Take a waiting job out; False when it does not wait."""
        if not self.waits(job_id):
            return False
        self._of(job_id).waiting.remove(job_id)
        self._forget(job_id)
        return True

    def at_work(self, job_id: str) -> None:
        """A job in a lane has done what it takes to begin."""
        turn = self._of(job_id).turns[job_id]
        if turn.setup_s is None:
            turn.setup_s = self._clock() - turn.began

    def left(self, job_id: str, *, waits_again: bool = False, memory_bytes: int | None = None) -> None:
        """A job has left its lane, for good or to wait again; then with what it needs of memory, if that is new."""
        claim = self._of(job_id).end(job_id, self._clock())
        given = self._memory.take_back(job_id)
        if waits_again:
            self._wait(replace(claim, memory_bytes=given if memory_bytes is None else memory_bytes))
        else:
            self._forget(job_id)
        self.look()

    def keep(self, lanes: Mapping[str, int]) -> None:
        """Have these devices no more than so many lanes from now on, one at least; who is in a lane stays there."""
        for device, count in lanes.items():
            self._lanes[device].count = max(1, min(count, self._lanes[device].count))

    def open(self) -> None:
        """From now on jobs are started: those of an earlier server are all here, so that the best goes first."""
        self.is_open = True
        self.look()

    def close(self) -> None:
        """Start nothing more."""
        self.is_open = False

    def look(self) -> None:
        """Start what can be started, and ask to make room who has to. To be called now and then while jobs wait."""
        if not self.is_open:
            return
        now = self._clock()
        if self._overdue is not None and not self._in_reach(self._overdue):
            self._overdue = None  # kept for it, memory would lie idle
        for lanes in self._lanes.values():
            lanes.settle(now)
            while lanes.free and (claim := self._next(lanes)) is not None:
                if not self._begin(lanes, claim, now):
                    break
            self._note_blocked(lanes, now)
            self._make_room(lanes, now)

    def _wait(self, claim: Claim) -> None:
        self._devices[claim.job_id] = claim.device
        self._lanes[claim.device].waiting.add(claim)

    def _of(self, job_id: str) -> Lanes:
        return self._lanes[self._devices[job_id]]

    def _forget(self, job_id: str) -> None:
        del self._devices[job_id]
        self._unblock(job_id)

    def _unblock(self, job_id: str) -> None:
        self._blocked_since.pop(job_id, None)
        if self._overdue is not None and self._overdue.job_id == job_id:
            self._overdue = None

    def _begin(self, lanes: Lanes, claim: Claim, now: float) -> bool:
        if not self._memory.give(claim.job_id, claim.memory_bytes):
            return False  # a running job has just taken more
        lanes.begin(claim, now)
        self._unblock(claim.job_id)
        self._start(claim)
        return True

    def _next(self, lanes: Lanes) -> Claim | None:
        """The best claim for which there is memory."""
        overdue = self._overdue
        if overdue is not None and overdue.job_id in lanes.waiting and self._memory.fits(overdue.memory_bytes):
            return overdue
        for claim in islice(lanes.waiting.in_order(), MAX_PASSED_OVER):
            kept = overdue.memory_bytes if overdue is not None and not claim.precedes(overdue) else 0
            if self._memory.fits(claim.memory_bytes + kept):
                return claim
        return None

    def _in_reach(self, claim: Claim) -> bool:
        """Whether a claim's memory is free when all have made room that do so for one that is overdue."""
        stay = sum(self._memory.given(turn.claim.job_id) for turn in self._turns() if turn.claim.precedes(claim))
        return claim.memory_bytes <= self._memory.limit_bytes - stay

    def _contenders(self, lanes: Lanes) -> Iterator[Claim]:
        """The best claims, without those that no room can be made for."""
        return filter(self._in_reach, islice(lanes.waiting.in_order(), MAX_PASSED_OVER))

    def _turns(self) -> Iterator[Turn]:
        return (turn for lanes in self._lanes.values() for turn in lanes.turns.values())

    def _note_blocked(self, lanes: Lanes, now: float) -> None:
        """Remember since when the best claim lacks memory; in the end what it needs is kept for it."""
        best = next(self._contenders(lanes), None)
        if best is None or self._memory.fits(best.memory_bytes):
            return
        since = self._blocked_since.setdefault(best.job_id, now)
        if self._overdue is None and now - since >= PASSED_OVER_S:
            self._overdue = best

    def _make_room(self, lanes: Lanes, now: float) -> None:
        overdue = self._overdue
        if overdue is not None:
            for turn in lanes.yielding(overdue, now):
                lacks_lane = overdue.job_id in lanes.waiting and not lanes.free_soon
                if self._free_soon() < overdue.memory_bytes or lacks_lane:
                    self._ask(turn)
        contenders = list(islice(self._contenders(lanes), lanes.count))
        while (worst := lanes.to_park(contenders, now, self._would_fit)) is not None:
            self._ask(worst)

    def _ask(self, turn: Turn) -> None:
        turn.is_asked = True
        self._park(turn.claim.job_id)

    def _would_fit(self, claim: Claim, turn: Turn) -> bool:
        return claim.memory_bytes <= self._free_soon() + self._memory.given(turn.claim.job_id)

    def _free_soon(self) -> int:
        """Bytes that are free when all who were asked to have made room."""
        leaving = sum(self._memory.given(turn.claim.job_id) for turn in self._turns() if turn.is_asked)
        return self._memory.limit_bytes - self._memory.used_bytes + leaving
