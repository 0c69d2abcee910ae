"""What a job is asked to do: the body of a POST, kept with the job so that a restart can go on."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from typing_extensions import TypeAliasType

from service.engine.config import Profile, QuantizationConfig
from service.jobs.blob_paths import MAX_PATH_BYTES, check_path, check_together


def _without_colon(key: str) -> str:
    if ":" in key:
        raise ValueError("must not hold a colon: a filter `label=key:value` could not name it")
    return key


Label = Annotated[str, StringConstraints(min_length=1, max_length=128)]
LabelKey = Annotated[Label, AfterValidator(_without_colon)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
BlobPath = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PATH_BYTES), AfterValidator(check_path)]


def _fit_together(files: dict[str, str]) -> dict[str, str]:
    check_together(files)
    return files


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class UriSource(_Body):
    """A model at an address."""

    type: Literal["uri"]
    uri: str = Field(
        min_length=1,
        max_length=4096,
        description="`file://` and a path under a model root, or under a remote root `s3://bucket/path`, "
        "`gs://bucket/path`, `az://container/path` or `hf://owner/name@revision/path`.",
    )


class JobSource(_Body):
    """An output of an earlier job."""

    type: Literal["job"]
    job_id: str = Field(min_length=1, max_length=64)
    output: Name | None = Field(default=None, description="Its name; may be left out where there is only one.")


class BlobsSource(_Body):
    """Files that were uploaded, as a folder."""

    type: Literal["blobs"]
    files: Annotated[dict[BlobPath, Digest], AfterValidator(_fit_together)] = Field(
        min_length=1,
        max_length=4096,
        description="From the path in the folder to the blob: `sha256:` and its digest in hexadecimal.",
    )

    @property
    def digests(self) -> dict[str, str]:
        """From path to SHA-256 in hexadecimal."""
        return {path: digest.removeprefix("sha256:") for path, digest in self.files.items()}


# Named types, so that they have their names in the OpenAPI document as well.
Source = TypeAliasType("Source", Annotated[UriSource | JobSource | BlobsSource, Field(discriminator="type")])


CalibrationSource = TypeAliasType("CalibrationSource", Annotated[UriSource | BlobsSource, Field(discriminator="type")])


class OutputRequest(_Body):
    """A model to write."""

    format: str = Field(description="One of `/v1/formats`.")
    name: Name | None = Field(default=None, description="Folder of its artifacts; by default the format.")
    config: QuantizationConfig | None = Field(default=None, description="Overrides the job's `config`.")
    options: dict[str, Any] | None = Field(default=None, description="The format's own options, see `/v1/formats`.")
    uri: str | None = Field(
        default=None,
        max_length=4096,
        description="Where to write, instead of the server's store: `file://`, `s3://`, `gs://` or `az://`.",
    )

    @property
    def folder(self) -> str:
        """Its name, or what stands for it."""
        return self.name or self.format


#: What a receiver can be told of: each is a change of the job's state, or the start of a server that goes on with it.
WebhookEvent = TypeAliasType(
    "WebhookEvent",
    Literal["job.queued", "job.started", "job.resumed", "job.succeeded", "job.failed", "job.cancelled"],
)
WEBHOOK_EVENTS: frozenset[str] = frozenset(get_args(WebhookEvent.__value__))


class Webhook(_Body):
    """Whom to tell what happens to the job, after Standard Webhooks 1.0."""

    url: str = Field(
        min_length=1,
        max_length=2048,
        description="`https://`, in the public internet unless the operator allows more. Its query is not shown again.",
    )
    events: list[WebhookEvent] = Field(
        default=["job.succeeded", "job.failed", "job.cancelled"],
        min_length=1,
        max_length=16,
        description="What to be told of; by default how the job ends.",
    )


class _JobBody(_Body):
    profile: Profile = Profile.LOCAL
    config: QuantizationConfig | None = None
    timeout_s: float | None = Field(
        default=None,
        strict=True,
        gt=0,
        le=30 * 86400,
        description="How long the job may run. The time it waits does not count, for its first turn or a later one.",
    )
    max_pending_s: float | None = Field(
        default=None,
        strict=True,
        gt=0,
        le=30 * 86400,
        description="How long after its creation the job has to have begun, or it fails with `pending_timeout`.",
    )
    priority: int = Field(
        default=0,
        strict=True,
        ge=-100,
        le=100,
        description="As long as jobs of a higher priority wait, those of a lower one of the same tenant get no turn. "
        "Between tenants it counts for nothing: who was served least goes first.",
    )
    labels: dict[LabelKey, Label] = Field(
        default_factory=dict, max_length=32, description="To find the job by; no colon in the names."
    )
    webhook: Webhook | None = None


class QuantizeRequest(_JobBody):
    """Quantize a model and write it in one or more formats."""

    kind: Literal["quantize"]
    source: Source
    calibration: CalibrationSource | None = Field(
        default=None, description="What the model's layers are fed: a safetensors, Parquet or imatrix.gguf file."
    )
    outputs: list[OutputRequest] = Field(min_length=1, max_length=16)


class ValidateRequest(_JobBody):
    """Measure how far one stored model is from another; writes only a report."""

    kind: Literal["validate"]
    original: Source
    quantized: Source
    calibration: CalibrationSource | None = Field(
        default=None, description="What the original's layers are fed: their outputs are then compared as well."
    )


JobRequest = TypeAliasType("JobRequest", Annotated[QuantizeRequest | ValidateRequest, Field(discriminator="kind")])


class BatchRequest(_Body):
    """Several jobs at once: all of them are accepted, or none."""

    items: list[JobRequest] = Field(min_length=1, max_length=1000)
    labels: dict[LabelKey, Label] = Field(
        default_factory=dict, max_length=32, description="Of the batch; jobs have theirs. No colon in the names."
    )
