"""What is kept no longer, as the API asks for it and tells of it."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from service.api.schemas.common import Wire
from service.jobs.retention import NAMED, What, Why


class GarbageRequest(BaseModel):
    """What to go by, where that is not what the server's settings say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dry_run: bool = Field(default=False, description="Only tell what would go.")
    artifact_ttl_s: float | None = Field(default=None, ge=0, description="Of files, from the end of their job.")
    event_ttl_s: float | None = Field(default=None, ge=0, description="Of logs, from the end of their job.")
    job_ttl_s: float | None = Field(default=None, ge=0, description="Of jobs with all that is theirs, from their end.")
    blob_ttl_s: float | None = Field(default=None, ge=0, description="Of uploads, from their last use.")
    max_total_bytes: int | None = Field(default=None, ge=0, description="Of all files and the database.")


class GarbageTally(Wire):
    """How many of a kind went, and how many bytes of files that was."""

    count: int
    size_bytes: int


class GarbageTallies(Wire):
    """All kinds; of `events` the logs are counted, and of `uploads` those that never became whole."""

    jobs: GarbageTally
    artifacts: GarbageTally
    events: GarbageTally
    blobs: GarbageTally
    uploads: GarbageTally


class GarbageItem(Wire):
    """Something that went: a job, its artifacts or its log, a blob, an upload."""

    what: What
    why: Why
    id: str = Field(description="Of the job, or the SHA-256 of the blob.")
    tenant: str
    since: datetime = Field(description="From when its age counts.")
    size_bytes: int


class Garbage(Wire):
    """What went, or in a dry run would go now."""

    dry_run: bool
    removed: GarbageTallies
    items: list[GarbageItem] = Field(description=f"The first {NAMED}.")
