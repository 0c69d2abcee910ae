"""The jobs that wait for a lane of one device, in the order of their claims.

The tenant goes first that was served least (see `fairness`). Of its jobs a higher priority goes first, always, and
among equals the one on the lowest level: a job begins on the lowest and climbs as it is served, so that a new short
one does not wait for old long ones, and long ones do not take turns with each other for nothing. On a level who came
first goes first. Every so often a tenant's turn goes to that of its climbed jobs which has waited longest: a stream
of short ones does not hold a long one up for ever.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from service.jobs.fairness import FairClock

#: Seconds of service with which a job climbs to the next level.
LEVELS_S = (2.0, 16.0, 128.0)
#: Of so many turns of a tenant one goes to the job above the lowest level that has waited longest.
PATIENT_TURN = 8


@dataclass(frozen=True, slots=True)
class Claim:
    """What a job asks for: a lane and memory. `arrival` orders jobs by age, `service_s` is what it has had."""

    job_id: str
    tenant: str
    arrival: int
    priority: int = 0
    device: str = "cpu"
    memory_bytes: int = 0
    service_s: float = 0.0

    @property
    def level(self) -> int:
        """How much it was served, in rough steps."""
        return bisect_right(LEVELS_S, self.service_s)

    @property
    def rank(self) -> tuple[int, int]:
        """Its place among the jobs of its tenant and priority, the smallest first."""
        return self.level, self.arrival

    def precedes(self, other: Claim) -> bool:
        """Whether the other one never gets a turn in its stead: a priority orders the jobs of a tenant."""
        return self.tenant == other.tenant and self.priority > other.priority


@dataclass(slots=True)
class _Group:
    """The waiting jobs of a tenant with one priority."""

    ranks: list[tuple[tuple[int, int], str]] = field(default_factory=list)  # sorted
    claims: dict[str, Claim] = field(default_factory=dict)
    climbed: OrderedDict[str, None] = field(default_factory=OrderedDict)  # who has waited longest first
    turns: int = 0

    def add(self, claim: Claim) -> None:
        insort(self.ranks, (claim.rank, claim.job_id))
        self.claims[claim.job_id] = claim
        if claim.level:
            self.climbed[claim.job_id] = None

    def remove(self, claim: Claim) -> None:
        del self.ranks[bisect_left(self.ranks, (claim.rank, claim.job_id))]
        del self.claims[claim.job_id]
        self.climbed.pop(claim.job_id, None)

    def in_order(self) -> Iterator[Claim]:
        is_patient = self.turns % PATIENT_TURN == PATIENT_TURN - 1
        oldest = next(iter(self.climbed), None) if is_patient else None
        if oldest is not None:
            yield self.claims[oldest]
        yield from (self.claims[job_id] for _, job_id in self.ranks if job_id != oldest)


@dataclass(slots=True)
class _Queue:
    """The waiting jobs of a tenant."""

    time: float
    groups: dict[int, _Group] = field(default_factory=dict)  # by negative priority
    order: list[int] = field(default_factory=list)  # of groups; sorted
    count: int = 0

    def add(self, claim: Claim) -> None:
        negative = -claim.priority
        if negative not in self.groups:
            self.groups[negative] = _Group()
            insort(self.order, negative)
        self.groups[negative].add(claim)
        self.count += 1

    def remove(self, claim: Claim) -> None:
        negative = -claim.priority
        self.groups[negative].remove(claim)
        self.count -= 1
        if not self.groups[negative].claims:
            del self.groups[negative]
            del self.order[bisect_left(self.order, negative)]

    def in_order(self) -> Iterator[Claim]:
        for negative in self.order:
            yield from self.groups[negative].in_order()

    def ahead_of(self, priority: int) -> int:
        """How many go before one that came now: those of higher priorities, and equals on the lowest level."""
        higher = sum(len(group.claims) for negative, group in self.groups.items() if -negative > priority)
        own = self.groups.get(-priority)
        return higher + (bisect_left(own.ranks, ((1, 0), "")) if own is not None else 0)


class Waiting:
    """The claims that wait; a change costs a binary search and a shift of pointers, at 10,000 of them too."""

    def __init__(self) -> None:
        self.clock = FairClock()
        self._queues: dict[str, _Queue] = {}  # by tenant
        self._order: list[tuple[float, str]] = []  # of queues: time, tenant; sorted
        self._claims: dict[str, Claim] = {}

    def __len__(self) -> int:
        """How many wait."""
        return len(self._claims)

    def __contains__(self, job_id: str) -> bool:
        """Whether a job waits."""
        return job_id in self._claims

    @property
    def tenants(self) -> frozenset[str]:
        """Whose jobs wait."""
        return frozenset(self._queues)

    def count(self, tenant: str) -> int:
        """How many of a tenant wait."""
        queue = self._queues.get(tenant)
        return queue.count if queue is not None else 0

    def add(self, claim: Claim) -> None:
        """Have a job wait."""
        tenant = claim.tenant
        if tenant not in self._queues:
            self.clock.join(tenant)
            self._queues[tenant] = _Queue(self.clock[tenant])
            insort(self._order, (self.clock[tenant], tenant))
        self._queues[tenant].add(claim)
        self._claims[claim.job_id] = claim

    def remove(self, job_id: str) -> Claim | None:
        """Take a job out; None when it does not wait."""
        claim = self._claims.pop(job_id, None)
        if claim is None:
            return None
        queue = self._queues[claim.tenant]
        queue.remove(claim)
        if not queue.count:
            del self._queues[claim.tenant]
            del self._order[bisect_left(self._order, (queue.time, claim.tenant))]
        return claim

    def take(self, claim: Claim) -> None:
        """Take a job out because it is its turn."""
        self._queues[claim.tenant].groups[-claim.priority].turns += 1
        self.remove(claim.job_id)

    def charge(self, tenant: str, seconds: float) -> None:
        """A tenant was served for so long."""
        self.clock.charge(tenant, seconds)
        queue = self._queues.get(tenant)
        if queue is not None:
            del self._order[bisect_left(self._order, (queue.time, tenant))]
            queue.time = self.clock[tenant]
            insort(self._order, (queue.time, tenant))

    def least_time(self) -> float | None:
        """The time of the tenant that was served least of those that wait."""
        return self._order[0][0] if self._order else None

    def in_order(self) -> Iterator[Claim]:
        """The claims, the best one first; nothing may change meanwhile."""
        for _, tenant in self._order:
            yield from self._queues[tenant].in_order()

    def ahead_of(self, tenant: str, priority: int) -> int:
        """How many of the waiting would have their turn before a job that came now, if nothing else came."""
        own = self._queues.get(tenant)
        mine = own.ahead_of(priority) if own is not None else 0
        me = (self.clock[tenant], tenant)
        # Tenants go in turns.
        others = (
            min(self._queues[other].count, mine + ((time, other) < me))
            for time, other in self._order
            if other != tenant
        )
        return mine + sum(others)
