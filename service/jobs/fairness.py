"""Virtual time: how much of the lanes each tenant has had, so that the one with the least goes next.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): a tenant's time is the seconds it was served. A tenant that
wants lanes again begins at the time of those that go next now, or at its own when that is later: time in which it
wanted nothing earns no credit, and lanes that nobody else wanted cost it nothing.
"""

from __future__ import annotations


class FairClock:
    """The virtual times of tenants, in seconds of service."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._now = 0.0

    def __getitem__(self, tenant: str) -> float:
        """A tenant's time; that of one who is not known is now."""
        return self._times.get(tenant, self._now)

    def __len__(self) -> int:
        """How many tenants are remembered."""
        return len(self._times)

    def join(self, tenant: str) -> None:
        """A tenant that had nothing waiting wants lanes."""
        self._times[tenant] = max(self[tenant], self._now)

    def charge(self, tenant: str, seconds: float) -> None:
        """A tenant was served for so long."""
        self._times[tenant] = self[tenant] + seconds

    def advance(self, time: float) -> None:
        """Whoever goes next is at this time; it never goes back."""
        self._now = max(self._now, time)

    def leave(self, tenant: str) -> None:
        """A tenant wants nothing now: it is forgotten, unless it has had more than those that go next."""
        if self._times.get(tenant, 0.0) <= self._now:
            self._times.pop(tenant, None)

    def forget_idle(self, wanting: frozenset[str]) -> None:
        """Forget all tenants who want nothing and who have been caught up with."""
        for tenant in [t for t in self._times if t not in wanting]:
            self.leave(tenant)
