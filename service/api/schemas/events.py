"""What happens to a job: the union of all events."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypeAliasType

from service.api.schemas.common import Wire
from service.api.schemas.jobs import Job, Progress
from service.jobs.job import Status


class _Event(Wire):
    id: int | None = Field(default=None, description="Grows within the stream, of the job or of the batch.")
    job_id: str
    index: int | None = Field(default=None, description="In the stream of a batch: that of the job's item.")
    at: datetime


class _Word(Wire):
    job_id: str | None = Field(default=None, description="In the stream of a job.")
    batch_id: str | None = Field(default=None, description="In the stream of a batch.")
    at: datetime


class JobQueued(_Event):
    """The job waits for its turn."""

    type: Literal["job.queued"]
    status: Status
    queue_position: int


class JobStarted(_Event):
    """The job runs."""

    type: Literal["job.started"]
    status: Status


class JobResumed(_Event):
    """The job goes on after a restart of the server."""

    type: Literal["job.resumed"]
    status: Status
    queue_position: int | None = None


class JobProgress(_Event):
    """How far the job has come; at most ten a second, and not kept for replay."""

    type: Literal["job.progress"]
    progress: Progress


class TensorCompleted(_Event):
    """One tensor is finished in one output. A copy has the scheme `none` and no figures."""

    type: Literal["tensor.completed"]
    output: str
    name: str
    shape: list[int]
    scheme: str
    bits: float
    cosine_similarity: float | None = None
    sqnr_db: float | None = None
    bytes_in: int
    bytes_out: int
    seconds: float


class JobWarning(_Event):
    """Something that the user may not expect, such as a fallback."""

    type: Literal["job.warning"]
    code: str
    text: str
    tensor: str | None = Field(default=None, description="The tensor concerned; absent where it is the whole source.")
    output: str | None = Field(default=None, description="The name of the output concerned; absent where it is all.")


class JobSucceeded(_Event):
    """The job is done; the stream ends."""

    type: Literal["job.succeeded"]
    status: Status
    job: Job


class JobFailed(_Event):
    """The job failed; the stream ends."""

    type: Literal["job.failed"]
    status: Status
    job: Job


class JobCancelled(_Event):
    """The job was cancelled; the stream ends."""

    type: Literal["job.cancelled"]
    status: Status
    job: Job


class ReaderTooSlow(_Word):
    """This reader could not keep up and is cut off; it can resume behind the last `id` it has."""

    type: Literal["reader.too_slow"]


class ServerDraining(_Word):
    """The server is shutting down; the stream ends and can be resumed when it is back."""

    type: Literal["server.draining"]


Event = TypeAliasType(
    "Event",
    Annotated[
        JobQueued
        | JobStarted
        | JobResumed
        | JobProgress
        | TensorCompleted
        | JobWarning
        | JobSucceeded
        | JobFailed
        | JobCancelled
        | ReaderTooSlow
        | ServerDraining,
        Field(discriminator="type"),
    ],
)


class EventPage(Wire):
    """Some of a job's events, oldest first."""

    data: list[Event]
    next_cursor: str | None = Field(default=None, description="Give it as `after` for the next page.")
