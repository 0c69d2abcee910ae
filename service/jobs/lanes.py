"""The lanes of one device: whose turn it is in each, and who has to make room for whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from service.jobs.waiting import Claim, Waiting

#: A turn lasts this long at least, when a job that has hardly been served asks for the lane.
TURN_S = 1.0
#: And so many times as long as it takes to begin: opening the model, making the plan, reading the checkpoint.
SETUP_SHARE = 10
#: But no longer than this when it is at work, however long it took to begin.
MAX_WORK_S = 30.0
#: A tenant takes another one's lane only when it has had this much less for each lane that it has.
LAG_S = 10.0


@dataclass(slots=True)
class Turn:
    """A job in a lane."""

    claim: Claim
    began: float
    charged_until: float
    setup_s: float | None = None  # None until it is at work
    is_asked: bool = False  # to make room

    def is_over(self, asking: Claim, now: float) -> bool:
        """Whether it has lasted long enough for this claim: the longer that one's job runs, the less its hurry."""
        if self.setup_s is None:
            return False
        worth_it = min(SETUP_SHARE * self.setup_s, self.setup_s + MAX_WORK_S)
        return now - self.began >= max(TURN_S * (1 << asking.level), worth_it)


class Lanes:
    """A fixed number of lanes and those that wait for one. Times are of a clock that only goes forward."""

    def __init__(self, count: int) -> None:
        self.waiting = Waiting()
        self.turns: dict[str, Turn] = {}
        #: How many lanes there are, empty or not.
        self.count = count

    @property
    def free(self) -> int:
        """How many lanes are empty."""
        return max(0, self.count - len(self.turns))

    @property
    def free_soon(self) -> int:
        """How many lanes are empty when all who were asked to have left."""
        return self.free + sum(turn.is_asked for turn in self.turns.values())

    def begin(self, claim: Claim, now: float) -> None:
        """A waiting job gets a lane."""
        self.waiting.take(claim)
        self.turns[claim.job_id] = Turn(claim, now, now)

    def end(self, job_id: str, now: float) -> Claim:
        """A job leaves its lane; its claim with what it was served."""
        self.settle(now)
        claim = self.turns.pop(job_id).claim
        serving = {turn.claim.tenant for turn in self.turns.values()}
        self.waiting.clock.forget_idle(self.waiting.tenants | serving)
        return claim

    def settle(self, now: float) -> None:
        """Charge what was served up to now."""
        clock = self.waiting.clock
        for turn in self.turns.values():
            seconds, turn.charged_until = now - turn.charged_until, now
            turn.claim = replace(turn.claim, service_s=turn.claim.service_s + seconds)
            self.waiting.charge(turn.claim.tenant, seconds)
        least = self.waiting.least_time()
        if least is None:
            least = max((clock[turn.claim.tenant] for turn in self.turns.values()), default=0.0)
        clock.advance(least)

    def to_park(self, claims: Sequence[Claim], now: float, helps: Callable[[Claim, Turn], bool]) -> Turn | None:
        """The turn that has to end next, of the worst claim, so that a better one gets its lane; None if none has to.

        `claims` are those of the best that may get a lane, `helps` tells whether one could if this turn ended.
        """
        lanes = Counter(turn.claim.tenant for turn in self.turns.values() if not turn.is_asked)
        for place, claim in enumerate(claims):
            # The first ones get the lanes that are empty, or that others have been asked for.
            if place >= self.free_soon:
                over = self._over(claim, now)
                outranked = [t for t in over if self._outranks(claim, t.claim, lanes[claim.tenant]) and helps(claim, t)]
                if outranked:
                    return outranked[0]
            lanes[claim.tenant] += 1
        return None

    def yielding(self, overdue: Claim, now: float) -> list[Turn]:
        """The turns that are over and give way to a claim that is overdue: all but those that precede it."""
        return [turn for turn in self._over(overdue, now) if not turn.claim.precedes(overdue)]

    def _over(self, claim: Claim, now: float) -> list[Turn]:
        """The turns that are over for this claim, the worst first."""
        found = [turn for turn in self.turns.values() if not turn.is_asked and turn.is_over(claim, now)]
        return sorted(found, key=lambda turn: self._standing(turn.claim), reverse=True)

    def _outranks(self, waiting: Claim, running: Claim, lanes: int) -> bool:
        """Whether a claim is better than that of a running job; `lanes` are how many its tenant has or will have."""
        if waiting.tenant == running.tenant:
            return (-waiting.priority, waiting.rank) < (-running.priority, running.rank)
        clock = self.waiting.clock
        return clock[running.tenant] - clock[waiting.tenant] > LAG_S * lanes

    def _standing(self, claim: Claim) -> tuple[float, int, tuple[int, int]]:
        return self.waiting.clock[claim.tenant], -claim.priority, claim.rank
