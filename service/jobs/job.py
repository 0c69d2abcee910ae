"""A job: its record, its states, and the only way from one to the next."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from service.engine.progress import Progress
from service.errors import IllegalTransition
from service.jobs.request import JobRequest, QuantizeRequest
from service.jobs.tenant import DEFAULT_TENANT


class Status(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can happen to the job any more."""
        return not TRANSITIONS[self]


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELLED, Status.FAILED}),
    Status.RUNNING: frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLING}),
    Status.CANCELLING: frozenset({Status.CANCELLED, Status.FAILED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed, by the code of the error tree."""

    code: str
    detail: str
    tensor: str | None = None
    pointer: str | None = None


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file that a job wrote. `path` starts with the output's name; `location` is where it lies."""

    path: str
    size_bytes: int
    sha256: str
    media_type: str
    location: str


@dataclass(frozen=True, slots=True)
class Job:
    """The record of a job; immutable, `to` makes the next one."""

    id: str
    request: JobRequest
    config: dict[str, Any]
    status: Status
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    progress: Progress | None = None
    result: dict[str, Any] | None = None
    error: Failure | None = None
    artifacts: tuple[Artifact, ...] = field(default=())
    batch_id: str | None = None
    batch_index: int | None = None
    tenant: str = DEFAULT_TENANT
    #: Since when its files in the data folder are gone; those at addresses of their own never expire.
    artifacts_expired_at: datetime | None = None
    #: Since when its log holds its last event alone.
    events_expired_at: datetime | None = None
    #: Seconds by part of the work, see `service.engine.clock`.
    times: dict[str, float] = field(default_factory=dict)
    #: The call that made it, as the log names it, and the trace that the call belongs to (W3C `traceparent`).
    request_id: str | None = None
    traceparent: str | None = None

    @property
    def queue_s(self) -> float | None:
        """How long it waited until it started, or was ended waiting; None while it waits."""
        until = self.started_at or self.finished_at
        return None if until is None else (until - self.created_at).total_seconds()

    def to(self, status: Status, **changes: Any) -> Job:
        """The job in its next state, its time noted; raises IllegalTransition when there is no such way."""
        if status not in TRANSITIONS[self.status]:
            raise IllegalTransition(f"job {self.id} is {self.status}, which cannot become {status}")
        if status is Status.RUNNING:
            changes.setdefault("started_at", datetime.now(UTC))
        if status.is_terminal:
            changes.setdefault("finished_at", datetime.now(UTC))
        return replace(self, status=status, **changes)

    def is_kept(self, artifact: Artifact) -> bool:
        """Whether a file that the job wrote is still there, as far as it was the service's to keep."""
        return self.artifacts_expired_at is None or not self.is_ours(artifact)

    def is_ours(self, artifact: Artifact) -> bool:
        """Whether a file lies in the data folder, and not at an address of its own, where it is the user's."""
        if not isinstance(self.request, QuantizeRequest):
            return True
        ours = {output.folder for output in self.request.outputs if output.uri is None}
        return artifact.path.partition("/")[0] in ours
