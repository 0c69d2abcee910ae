"""What an operator can set: one frozen object, from arguments, then `ARROWQUANT_` variables, then defaults."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, IPvAnyNetwork, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.engine.config import QuantizationConfig
from service.errors import ArrowQuantError, InvalidConfig
from service.jobs.retention import Rules
from service.jobs.webhooks.retries import DELAYS_S
from service.logs import LogFormat
from service.storage.remote_address import parse_root
from service.storage.store_options import StoreOptions

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
    remote_roots: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="What `s3://`, `gs://`, `az://` and `hf://` addresses must begin with, whole parts of them, such "
        "as `s3://models/` or `hf://`; in the environment separated by spaces.",
    )
    s3_endpoint: str | None = Field(default=None, description="Of a store that is not AWS's own.")
    s3_region: str | None = Field(default=None, description="Instead of `AWS_REGION`.")
    gs_endpoint: str | None = Field(default=None, description="Of a store that is not Google's own.")
    az_endpoint: str | None = Field(default=None, description="Of a store that is not Azure's own.")
    hub_endpoint: str | None = Field(default=None, description="Of a hub that is not huggingface.co.")
    store_allow_http: bool = Field(default=False, description="Speak to these endpoints without TLS as well.")
    store_timeout_s: float = Field(default=60.0, gt=0, le=600, description="How long a store may fail to answer.")
    block_bytes: int = Field(default=64 << 20, ge=1 << 16, description="Bytes of a tensor worked on at once.")
    threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1, description="Of a backend, for all jobs.")
    max_running_jobs: int = Field(default=2, ge=1, description="That compute on the CPU at the same time.")
    device_lanes: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="As `max_running_jobs`, of other devices, as JSON; by default one a GPU.",
    )
    device_memory_bytes: int | None = Field(
        default=None,
        ge=1 << 20,
        description="Of each GPU's memory, and as much of this machine's beside it; by default as jobs take.",
    )
    memory_limit_bytes: int | None = Field(
        default=None, ge=1, description="Of all running jobs, as predicted; by default four fifths of what there is."
    )
    max_queued_jobs: int = Field(
        default=1000,
        ge=1,
        description="Where keys are asked for, the last tenth, 1 at least, is for tenants that have no job waiting.",
    )
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
        description="Of all artifacts, blobs, uploads and the database; beyond it goes what ended or was used longest "
        "ago, not within 10 min: files first, then logs, then jobs.",
    )
    upload_idle_s: float = Field(default=30.0, gt=0, description="How long an upload may stand still.")
    max_connections: int = Field(default=2000, ge=1, description="Open at once; more are answered with 503.")
    head_timeout_s: float = Field(default=20.0, gt=0, description="How long the headers of a call may take to come.")
    body_timeout_s: float = Field(
        default=30.0, gt=0, description="How long a body, uploads apart, may take beside a second for each 64 KiB."
    )
    unread_timeout_s: float = Field(
        default=300.0, gt=0, description="How long a client may read nothing of an answer that waits for it."
    )
    max_open_jobs: int | None = Field(
        default=None, ge=1, description="Of a tenant, not ended; without it there is no limit but `max_queued_jobs`."
    )
    requests_per_minute: int | None = Field(default=6000, ge=1, description="Of a tenant, where keys are asked for.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="That calls on loopback without keys may name in `Host`, beside localhost and its addresses; "
        "without ports, in the environment separated by commas.",
    )
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

    @property
    def kept_places(self) -> int:
        """Of the queue, for tenants that have no job waiting: one that fills it does not keep others out."""
        return max(1, self.max_queued_jobs // 10) if self.asks_for_keys else 0

    @model_validator(mode="after")
    def _contradict(self) -> Self:
        if self.require_keys and self.allow_unauthenticated:
            raise ValueError("require_keys and allow_unauthenticated contradict each other: set one of them")
        return self

    @field_validator("allowed_hosts", "webhook_allowed_networks", "webhook_retry_delays_s", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]", host):
                raise ValueError(f"{host!r} is no host: give names without http:// and without a port")
        return tuple(host.lower() for host in value)

    @property
    def stores(self) -> StoreOptions:
        """What is said of stores."""
        return StoreOptions(
            roots=tuple(parse_root(root) for root in self.remote_roots),
            s3_endpoint=self.s3_endpoint,
            s3_region=self.s3_region,
            gs_endpoint=self.gs_endpoint,
            az_endpoint=self.az_endpoint,
            hub_endpoint=self.hub_endpoint,
            allow_http=self.store_allow_http,
            timeout_s=self.store_timeout_s,
        )

    @field_validator("remote_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: Any) -> Any:
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("remote_roots")
    @classmethod
    def _check_roots(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for root in value:
            try:
                parse_root(root)
            except ArrowQuantError as error:
                raise ValueError(error.detail) from error
        return value

    @field_validator("s3_endpoint", "gs_endpoint", "az_endpoint", "hub_endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", value):
            raise ValueError("it has to be http:// or https:// and a host, without a user, a password or a query")
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
