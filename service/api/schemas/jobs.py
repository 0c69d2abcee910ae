"""A job as the API shows it."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field
from typing_extensions import TypeAliasType

from service.api.schemas.common import Links, Problem, Wire
from service.engine.config import ResolvedConfig
from service.jobs.job import Status
from service.jobs.request import JobRequest, WebhookEvent
from service.jobs.webhooks.delivery import DeliveryStatus

JobKind = TypeAliasType("JobKind", Literal["quantize", "validate"])
Stage = TypeAliasType("Stage", Literal["planning", "quantizing", "validating", "writing", "hashing"])


class Progress(Wire):
    """How far a job has come. `fraction` lies strictly between 0 and 1 and never falls."""

    fraction: float
    stage: Stage
    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int
    bytes_per_s: float
    eta_s: float | None = None


class Times(Wire):
    """Where the time of a job goes, in seconds. All but the first add up to about the time that it ran, without that
    when no server was up."""

    queue_s: float = Field(description="From accepted to started.")
    plan_s: float | None = Field(default=None, description="Opening the sources, reading headers, deciding.")
    read_s: float | None = Field(
        default=None, description="Waiting for weights; what was read ahead meanwhile costs nothing and is not in it."
    )
    quantize_s: float | None = Field(default=None, description="Computing scales, codes and errors.")
    compare_s: float | None = Field(default=None, description="Computing, of a validation.")
    write_s: float | None = Field(
        default=None, description="Waiting for what is written meanwhile, the journal included, and completing files."
    )
    hash_s: float | None = Field(
        default=None, description="Hashing what was not hashed while it was written, and waiting for the disk."
    )
    publish_s: float | None = Field(default=None, description="Putting everything in its place, or away.")
    wait_s: float | None = Field(default=None, description="Giving way to other jobs.")


class Figures(Wire):
    """What quantizing did to the weights of one output."""

    bit_width: int | None = Field(default=None, description="Absent where several widths are mixed.")
    bits_per_weight: float
    compression_ratio: float = Field(description="Of all bytes of the model.")
    weights_compression_ratio: float = Field(description="Of the quantized weights alone.")
    original_bytes: int
    quantized_bytes: int
    cosine_similarity: float
    sqnr_db: float | None = Field(default=None, description="Absent where nothing was lost.")
    relative_error: float | None = None
    max_abs_error: float
    output_cosine_similarity: float | None = Field(
        default=None, description="Of what the layers put out over their calibration, where it has Gram matrices."
    )
    output_sqnr_db: float | None = None
    output_relative_error: float | None = None
    tensors_quantized: int
    tensors_total: int
    passed: bool = Field(description="Whether `min_accuracy` is reached, by each tensor and by all together.")


class OutputFigures(Figures):
    """The figures of one output."""

    name: str
    format: str


class Result(Figures):
    """What a job achieved: the first output's figures, and each output's."""

    modality: str
    backend: str
    quantization_time_s: float
    warnings: list[str] = Field(description="The first 20; the report and the events have all.")
    warnings_total: int
    outputs: list[OutputFigures]


class WebhookDelivery(Wire):
    """One event on its way to the webhook. It is `skipped` when the receiver had answered 410 before."""

    id: str = Field(description="The `webhook-id` of all its attempts.")
    event: WebhookEvent
    status: DeliveryStatus
    created_at: datetime
    attempts: int
    last_status_code: int | None = None
    last_error: str | None = None
    next_attempt_at: datetime | None = None
    delivered_at: datetime | None = None


class JobWebhook(Wire):
    """How far the webhook of a job was told."""

    url: str = Field(description="Without its query.")
    deliveries: list[WebhookDelivery] = Field(description="The newest 20, oldest first.")


class Job(Wire):
    """A job. What is not there yet is left out."""

    id: str
    kind: JobKind
    status: Status
    batch_id: str | None = Field(default=None, description="The batch it was created with.")
    batch_index: int | None = Field(default=None, description="Its place among the batch's items.")
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    artifacts_expired_at: datetime | None = Field(
        default=None, description="Since when its files are kept no longer, but for outputs with a `uri`."
    )
    events_expired_at: datetime | None = Field(
        default=None, description="Since when its log is kept no longer, but for the last event."
    )
    request: JobRequest
    config: ResolvedConfig = Field(description="The configuration with nothing left open.")
    labels: dict[str, str]
    progress: Progress | None = None
    times: Times | None = Field(default=None, description="There when it has started, and grows with `progress`.")
    result: Result | None = None
    error: Problem | None = None
    webhook: JobWebhook | None = Field(default=None, description="There when the job alone is asked for.")
    links: Links


class JobPage(Wire):
    """Some jobs, newest first."""

    data: list[Job]
    next_cursor: str | None = Field(default=None, description="Give it as `after` for the next page.")
