"""What is kept no longer, as the API asks for it and tells of it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from service.api.schemas.common import Wire
from service.jobs.retention import NAMED, What, Why


def _number(value: Any) -> Any:
    # Otherwise `false` would be 0, and nothing be kept.
    if isinstance(value, bool | str):
        raise ValueError("is not a number")
    return value


Seconds = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Bytes = Annotated[int, Field(ge=0), BeforeValidator(_number)]


class GarbageRequest(BaseModel):
    """What to go by, where that is not what the server's settings say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dry_run: bool = Field(default=False, strict=True, description="Only tell what would go.")
    artifact_ttl_s: Seconds | None = Field(default=None, description="Of files, from the end of their job.")
    event_ttl_s: Seconds | None = Field(default=None, description="Of logs, from the end of their job.")
    job_ttl_s: Seconds | None = Field(default=None, description="Of jobs with all that is theirs, from their end.")
    blob_ttl_s: Seconds | None = Field(default=None, description="Of uploads, from their last use.")
    max_total_bytes: Bytes | None = Field(default=None, description="Of all files and the database.")


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
