"""Lanes, jobs and a clock that only this simulates: what the real scheduler makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from service.jobs.memory_ledger import MemoryLedger
from service.jobs.scheduler import Scheduler
from service.jobs.waiting import Claim

#: How often the scheduler is asked to look, and the finest that a simulation sees.
STEP_S = 0.1


@dataclass(slots=True)
class Work:
    """A job: how much it has to do, and how often it can make room."""

    seconds: float
    tensor_s: float = 0.2
    setup_s: float = 0.0
    done: float = 0.0
    turns: int = 0
    first_turn_at: float | None = None
    ended_at: float | None = None


@dataclass(slots=True)
class _Running:
    left_to_set_up: float
    since_tensor: float = 0.0
    is_asked: bool = False


@dataclass
class Simulation:
    """A scheduler whose jobs take simulated time."""

    lanes: Mapping[str, int] = field(default_factory=lambda: {"cpu": 1})
    memory: int = 1 << 40

    def __post_init__(self) -> None:
        self.now = 0.0
        self.jobs: dict[str, Work] = {}
        self.running: dict[str, _Running] = {}
        self.started: list[str] = []
        self.served: dict[str, float] = {}
        self.tenants: dict[str, str] = {}
        self.devices: dict[str, str] = {}
        self.ledger = MemoryLedger(self.memory)
        self.scheduler = Scheduler(self.lanes, self.ledger, self._start, self._park, clock=lambda: self.now)
        self.scheduler.open()

    def submit(
        self,
        job_id: str,
        work: Work,
        *,
        tenant: str = "t",
        priority: int = 0,
        device: str = "cpu",
        memory_bytes: int = 0,
    ) -> None:
        """A job arrives."""
        self.jobs[job_id], self.tenants[job_id], self.devices[job_id] = work, tenant, device
        self.scheduler.put(job_id, tenant, priority, device, memory_bytes)

    def run(self, seconds: float) -> None:
        """Let time go by."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.step()

    def run_until_ended(self, *job_ids: str, limit_s: float = 10_000.0) -> None:
        """Let time go by until these, or all, have ended."""
        wanted = job_ids or tuple(self.jobs)
        while any(self.jobs[job_id].ended_at is None for job_id in wanted):
            assert self.now < limit_s, f"not ended after {limit_s} s: {self.unfinished()}"
            self.step()

    def unfinished(self) -> list[str]:
        """The jobs that have not ended."""
        return [job_id for job_id, work in self.jobs.items() if work.ended_at is None]

    def step(self) -> None:
        """One step of time, then a look."""
        self.now += STEP_S
        for job_id, running in list(self.running.items()):
            self._advance(job_id, running)
        self.scheduler.look()
        self._check()

    def _advance(self, job_id: str, running: _Running) -> None:
        work = self.jobs[job_id]
        tenant = self.tenants[job_id]
        self.served[tenant] = self.served.get(tenant, 0.0) + STEP_S
        if running.left_to_set_up > 0:
            running.left_to_set_up -= STEP_S
            return
        self.scheduler.at_work(job_id)
        work.done += STEP_S
        running.since_tensor += STEP_S
        at_boundary = running.since_tensor >= work.tensor_s - 1e-9
        if at_boundary:
            running.since_tensor = 0.0
        if work.done >= work.seconds - 1e-9:
            work.ended_at = self.now
            del self.running[job_id]
            self.scheduler.left(job_id)
        elif at_boundary and running.is_asked:
            del self.running[job_id]
            self.scheduler.left(job_id, waits_again=True)

    def _start(self, claim: Claim) -> None:
        work = self.jobs[claim.job_id]
        assert claim.job_id not in self.running
        work.turns += 1
        work.first_turn_at = self.now if work.first_turn_at is None else work.first_turn_at
        self.running[claim.job_id] = _Running(work.setup_s)
        self.started.append(claim.job_id)

    def _park(self, job_id: str) -> None:
        assert not self.running[job_id].is_asked, "one is asked once"
        self.running[job_id].is_asked = True

    def _check(self) -> None:
        """What holds at any moment."""
        for device, count in self.lanes.items():
            assert sum(self.devices[job_id] == device for job_id in self.running) <= count
        assert self.ledger.used_bytes <= self.ledger.limit_bytes
        assert self.scheduler.running == len(self.running)
        assert self.scheduler.depth + self.scheduler.running == len(self.unfinished())
