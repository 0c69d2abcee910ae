"""What is kept how long: the rules, and what a sweep found to be beyond them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

from service.jobs.times import text_of

#: Named one by one in the account of a sweep; the rest is only counted.
NAMED = 200


@dataclass(frozen=True, slots=True)
class Rules:
    """How long things are kept, in seconds, and how much of them, in bytes; None is for ever and without limit.

    The age of what a job left counts from the job's end, for a job of a batch from the end of the batch; that of a
    blob from its last use. `max_total_bytes` is of all tenants' artifacts, blobs and uploads together, as quotas count
    them, and of the database: beyond it goes of those what ended or was used longest ago; when they do not suffice, the
    oldest logs, and then the oldest records. Nothing goes within `grace_s`, so that whoever waits for a result can
    fetch it.
    """

    artifact_ttl_s: float | None = None
    event_ttl_s: float | None = None
    job_ttl_s: float | None = None
    blob_ttl_s: float | None = 7 * 86400.0
    max_total_bytes: int | None = None
    grace_s: float = 600.0

    def overridden(self, **given: float | int | None) -> Rules:
        """These rules, with what is given, and not None, in place of theirs."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    @property
    def shortest_s(self) -> float | None:
        """The shortest of the times."""
        times = (self.artifact_ttl_s, self.event_ttl_s, self.job_ttl_s, self.blob_ttl_s)
        return min((time for time in times if time is not None), default=None)


KEEP_ALL = Rules()


class What(StrEnum):
    """What can go."""

    JOBS = "jobs"
    ARTIFACTS = "artifacts"
    EVENTS = "events"
    BLOBS = "blobs"
    UPLOADS = "uploads"


class Why(StrEnum):
    """Why it goes."""

    AGE = "age"
    SIZE = "size"


@dataclass(frozen=True, slots=True)
class Due:
    """Something that may have to go: a job's or a blob's id, since when it is kept, and how much it takes."""

    since: str
    tenant: str
    id: str
    size_bytes: int
    batch_id: str | None = None

    def is_among(self, taken: frozenset[str]) -> bool:
        """Whether somebody uses it."""
        return self.id in taken or self.batch_id in taken


@dataclass(frozen=True, slots=True)
class Removed:
    """Something that went, or would go."""

    what: What
    why: Why
    id: str
    tenant: str
    since: datetime
    size_bytes: int


@dataclass(slots=True)
class Tally:
    """How many of a kind went, and how much they took."""

    count: int = 0
    size_bytes: int = 0


@dataclass(slots=True)
class Swept:
    """The account of a sweep: what went, or would go. Of a long one only the first are named."""

    is_dry: bool = False
    tallies: dict[What, Tally] = field(default_factory=lambda: {what: Tally() for what in What})
    named: list[Removed] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many of all kinds."""
        return sum(tally.count for tally in self.tallies.values())

    @property
    def size_bytes(self) -> int:
        """How much it was, in bytes of files."""
        return sum(tally.size_bytes for tally in self.tallies.values())

    def add(self, what: What, why: Why, due: Due) -> None:
        """Note one that went."""
        tally = self.tallies[what]
        tally.count += 1
        tally.size_bytes += due.size_bytes
        if len(self.named) < NAMED:
            since = datetime.fromisoformat(due.since)
            self.named.append(Removed(what, why, due.id, due.tenant, since, due.size_bytes))

    def __str__(self) -> str:
        parts = [f"{tally.count} {what}" for what, tally in self.tallies.items() if tally.count]
        return f"{', '.join(parts) or 'nothing'}, {self.size_bytes} bytes"


def before(now: datetime, ttl_s: float | None) -> str | None:
    """The time, as the database has it, of which what is older has lived for too long; None when nothing has."""
    if ttl_s is None:
        return None
    try:
        return text_of(now - timedelta(seconds=ttl_s))
    except OverflowError:
        return None
