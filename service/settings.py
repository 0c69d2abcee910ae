"""What an operator can set: one frozen object, from arguments, then `ARROWQUANT_` variables, then defaults."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, IPvAnyNetwork, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.engine.config import QuantizationConfig
from service.errors import InvalidConfig
from service.jobs.retention import Rules
from service.jobs.webhooks.retries import DELAYS_S
from service.logs import LogFormat

PREFIX = "ARROWQUANT_"


def _config_from_environment() -> QuantizationConfig:
    return config_from(os.environ)


class Settings(BaseSettings):
    """The settings of a server."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="0 takes a free one.")
    data_dir: Path = Field(default=Path("data"), description="Jobs, artifacts and work in progress.")
    model_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(), description="Folders that `file://` addresses may name; in the environment separated by a colon."
    )
    block_bytes: int = Field(default=64 << 20, ge=1 << 16, description="Bytes of a tensor worked on at once.")
    threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1, description="Of a backend, for all jobs.")
    max_running_jobs: int = Field(default=2, ge=1, description="That compute on the CPU at the same time.")
    device_lanes: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="As `max_running_jobs`, of other devices, as JSON; by default one each."
    )
    memory_limit_bytes: int | None = Field(
        default=None, ge=1, description="Of all running jobs, as predicted; by default four fifths of what there is."
    )
    max_queued_jobs: int = Field(default=1000, ge=1)
    stream_silence_s: float = Field(
        default=15.0, gt=0, le=30, description="Between two comments on an event stream that has nothing to tell."
    )
    max_unread_events: int = Field(
        default=4096, ge=1, description="A reader of events that is further behind is cut off, and can resume."
    )
    drain_timeout_s: float = Field(default=30.0, ge=0, description="From SIGTERM to the end.")
    max_body_bytes: int = Field(default=1 << 20, ge=1024, description="Of a request's JSON.")
    max_table_bytes: int = Field(default=64 << 20, ge=1024, description="Of a table sent to `/v1/tensors:…`.")
    max_blob_bytes: int = Field(default=64 << 30, ge=1, description="Of an uploaded file.")
    max_stored_bytes: int | None = Field(
        default=None, ge=1, description="Of a tenant's artifacts and blobs; without it there is no limit."
    )
    blob_ttl_s: float = Field(default=7 * 86400.0, gt=0, description="How long an uploaded file is kept unused.")
    artifact_ttl_s: float | None = Field(
        default=None, gt=0, description="How long files are kept after the end of their job; without it for ever."
    )
    event_ttl_s: float | None = Field(
        default=None, gt=0, description="How long the log of an ended job is kept, but for its last event."
    )
    job_ttl_s: float | None = Field(
        default=None, gt=0, description="How long an ended job is kept, with all that belongs to it."
    )
    max_total_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Of all artifacts and blobs; beyond it goes what ended or was used longest ago, not within 10 min.",
    )
    upload_idle_s: float = Field(default=30.0, gt=0, description="How long an upload may stand still.")
    max_open_jobs: int | None = Field(
        default=None, ge=1, description="Of a tenant, not ended; without it there is no limit but `max_queued_jobs`."
    )
    requests_per_minute: int | None = Field(default=6000, ge=1, description="Of a tenant, where keys are asked for.")
    require_keys: bool = Field(default=False, description="Ask for an API key on loopback as well.")
    allow_unauthenticated: bool = Field(
        default=False, description="Ask for no key on addresses that others can reach either."
    )
    webhook_allowed_networks: Annotated[tuple[IPvAnyNetwork, ...], NoDecode] = Field(
        default=(),
        description="That webhooks may go to beside the public internet, such as `10.0.0.0/8`; in the environment "
        "separated by commas.",
    )
    webhook_allow_http: bool = Field(default=False, description="Let webhooks go without TLS, for all to read.")
    webhook_ca_file: Path | None = Field(
        default=None, description="Certificates in PEM to trust in webhooks, beside the usual ones."
    )
    webhook_timeout_s: float = Field(default=15.0, gt=0, le=60, description="Of an attempt, up to the status.")
    webhook_retry_delays_s: Annotated[tuple[Annotated[float, Field(gt=0)], ...], NoDecode] = Field(
        default=DELAYS_S,
        max_length=32,
        description="Between an attempt and the next; in the environment separated by commas.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = Field(
        default="text", description="`text` or `json`, which also has a line for each call; text has those at `debug`."
    )
    config_defaults: QuantizationConfig = Field(
        default_factory=_config_from_environment,
        description="What comes between a profile and a request: `ARROWQUANT_BIT_WIDTH` and the like.",
    )

    @property
    def retention(self) -> Rules:
        """What is kept how long."""
        names = ("artifact_ttl_s", "event_ttl_s", "job_ttl_s", "blob_ttl_s", "max_total_bytes")
        return Rules(**{name: getattr(self, name) for name in names})

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def asks_for_keys(self) -> bool:
        """Whether calls have to carry an API key."""
        return self.require_keys or not (self.is_loopback or self.allow_unauthenticated)

    @model_validator(mode="after")
    def _contradict(self) -> Self:
        if self.require_keys and self.allow_unauthenticated:
            raise ValueError("require_keys and allow_unauthenticated contradict each other: set one of them")
        return self

    @field_validator("webhook_allowed_networks", "webhook_retry_delays_s", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part for part in value.split(os.pathsep) if part)
        return value


def load_settings(**given: Any) -> Settings:
    """The settings; what is given, and not None, wins. Raises InvalidConfig naming the argument or variable."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise InvalidConfig(_explain(error)) from error


def config_from(environment: Mapping[str, str]) -> QuantizationConfig:
    """The fields of a configuration that variables set; lists cannot be set so. Raises InvalidConfig."""
    fields = {}
    for name in scalar_fields():
        text = environment.get(PREFIX + name.upper())
        if text:
            fields[name] = _value(text)
    try:
        return QuantizationConfig.model_validate(fields)
    except ValidationError as error:
        raise InvalidConfig(_explain(error)) from error


def scalar_fields() -> list[str]:
    """The fields of a configuration that a variable can set."""
    fields = QuantizationConfig.model_fields.items()
    return [name for name, field in fields if not any(_is_list(option) for option in get_args(field.annotation))]


def _is_list(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is list


def _value(text: str) -> Any:
    """Numbers and true or false as such, all else as text."""
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"setting {name} (or {PREFIX}{name.upper()}): {message}" if name else f"{PREFIX} variables: {message}"
