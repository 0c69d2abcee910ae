"""How many calls may come in a minute: a bucket of tokens for each tenant, and for keys with a limit of their own."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

WINDOW_S = 60


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit: `policy` is what it is called in headers, `owner` whose it is."""

    policy: str
    owner: str
    per_minute: int


class Bucket:
    """Holds up to `per_minute` tokens and fills in a minute; a call takes one."""

    def __init__(self, quota: Quota, now: float) -> None:
        self.quota = quota
        self._tokens = float(quota.per_minute)
        self._as_of = now

    @property
    def remaining(self) -> int:
        """Whole tokens."""
        return int(self._tokens)

    @property
    def next_s(self) -> float:
        """Seconds until there is a token."""
        return max(0.0, 1.0 - self._tokens) * WINDOW_S / self.quota.per_minute

    @property
    def full_s(self) -> float:
        """Seconds until it is full."""
        return (self.quota.per_minute - self._tokens) * WINDOW_S / self.quota.per_minute

    def fill(self, quota: Quota, now: float) -> None:
        """Bring up to now; the quota may have been changed meanwhile."""
        self.quota = quota
        gained = (now - self._as_of) * quota.per_minute / WINDOW_S
        self._tokens, self._as_of = min(float(quota.per_minute), self._tokens + gained), now

    def take(self) -> None:
        """Take a token."""
        self._tokens -= 1.0


class RateLimits:
    """The buckets of all who call, on one event loop."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def take(self, quotas: Iterable[Quota]) -> tuple[dict[str, str], float]:
        """Count a call against all its quotas.

        Returns headers that say how they stand, and the seconds to wait: 0 for a call that may go on, and was counted.
        """
        now = time.monotonic()
        buckets = [self._bucket(quota, now) for quota in quotas]
        wait_s = max((bucket.next_s for bucket in buckets), default=0.0)
        if not wait_s:
            for bucket in buckets:
                bucket.take()
        return _headers(buckets), wait_s

    def _bucket(self, quota: Quota, now: float) -> Bucket:
        bucket = self._buckets.setdefault((quota.policy, quota.owner), Bucket(quota, now))
        bucket.fill(quota, now)
        return bucket


def _headers(buckets: list[Bucket]) -> dict[str, str]:
    """As in draft-ietf-httpapi-ratelimit-headers-10."""
    if not buckets:
        return {}
    policies = [f'"{b.quota.policy}";q={b.quota.per_minute};w={WINDOW_S}' for b in buckets]
    states = [f'"{b.quota.policy}";r={b.remaining};t={math.ceil(b.full_s)}' for b in buckets]
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(states)}
