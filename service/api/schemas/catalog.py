"""What this server can do, and how it is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema
from typing_extensions import TypeAliasType

from service.api.schemas.common import Wire
from service.engine.config import Profile, ResolvedConfig

JsonSchema = TypeAliasType(
    "JsonSchema",
    Annotated[
        dict[str, Any],
        WithJsonSchema({"type": "object", "additionalProperties": True, "description": "A JSON Schema, 2020-12."}),
    ],
)


class ProfileInfo(Wire):
    """A set of defaults."""

    id: Profile
    config: ResolvedConfig = Field(description="What holds when a request sets nothing, on this server.")


class ProfileList(Wire):
    """All profiles."""

    data: list[ProfileInfo]


class SchemeInfo(Wire):
    """What numbers can become."""

    id: str
    description: str
    bits: int
    parameters: JsonSchema


class SchemeList(Wire):
    """All schemes."""

    data: list[SchemeInfo]


class MethodInfo(Wire):
    """A way to find scales."""

    id: str
    description: str
    parameters: JsonSchema


class MethodList(Wire):
    """All methods."""

    data: list[MethodInfo]


class FormatInfo(Wire):
    """How tensors can lie in files."""

    id: str
    description: str
    can_read: bool
    can_write: bool
    options: JsonSchema


class FormatList(Wire):
    """All formats."""

    data: list[FormatInfo]


class BackendInfo(Wire):
    """Where can be computed."""

    id: str
    description: str
    available: bool
    reason: str | None = Field(default=None, description="Why it is not available.")
    preferred: bool = Field(description="Whether `auto` means this one.")


class BackendList(Wire):
    """All backends."""

    data: list[BackendInfo]


HealthStatus = TypeAliasType("HealthStatus", Literal["ok"])
ReadyStatus = TypeAliasType("ReadyStatus", Literal["ready"])


class Health(Wire):
    """The process answers."""

    status: HealthStatus
    version: str


class Readiness(Wire):
    """The server takes jobs."""

    status: ReadyStatus
    backend: str
    queued_jobs: int
    running_jobs: int
    longest_stall_s: float = Field(description="Longest time for which the event loop was held up in the last minute.")
    lost_devices: dict[str, str] = Field(
        description="Devices that failed and are out of service until the next start, each with the reason."
    )
