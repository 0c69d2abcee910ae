"""What a job leaves behind, and what a plan says beforehand."""

from __future__ import annotations

from pydantic import Field

from service.api.schemas.common import Wire
from service.api.schemas.jobs import Figures, JobKind
from service.engine.config import ResolvedConfig
from service.engine.schemes.base import Granularity


class ArtifactInfo(Wire):
    """A file that a job wrote."""

    path: str = Field(description="Starts with the name of the output.")
    size_bytes: int
    sha256: str
    media_type: str


class ArtifactPage(Wire):
    """Some of a job's files, by path."""

    data: list[ArtifactInfo]
    next_cursor: str | None = Field(default=None, description="Give it as `after` for the next page.")


class ErrorSums(Wire):
    """Sums from which all figures follow; those of pieces add up to those of the whole."""

    count: int
    sum_xx: float
    sum_yy: float
    sum_xy: float
    sum_dd: float
    max_abs: float
    finite: bool
    out_xx: float | None = Field(default=None, description="The `out_` sums are there with a Gram matrix.")
    out_yy: float | None = None
    out_xy: float | None = None
    out_dd: float | None = None


class TimeGroups(Wire):
    """The activation grids that are stored of a layer, of 8 bits, one for each group of timesteps of its calibration.

    Errors are the expected squared error of an input, a mean over timesteps.
    """

    groups: int
    expected_error: float = Field(description="With the grids that are stored.")
    optimal_error: float = Field(description="With the best cuts between groups, and no smoothing.")
    uniform_error: float = Field(description="With groups of one length.")
    static_error: float = Field(description="With one grid for all timesteps.")
    smoothness_before: float = Field(
        description="By what share the larger of two neighbouring scales exceeds the other, at most; without smoothing."
    )
    smoothness_after: float = Field(description="The same of the grids that are stored.")


class TensorFigures(Wire):
    """One tensor in one output. A copied tensor has the scheme `none` and no figures."""

    name: str
    shape: list[int]
    dtype: str
    scheme: str
    rule: str = Field(description="Why it was treated so.")
    original_bytes: int
    stored_bytes: int
    seconds: float
    method: str | None = None
    bits: int | None = None
    symmetric: bool | None = None
    granularity: Granularity | None = None
    group_size: int | None = None
    scale_dtype: str | None = None
    cosine_similarity: float | None = None
    sqnr_db: float | None = None
    relative_error: float | None = None
    max_abs_error: float | None = None
    output_cosine_similarity: float | None = Field(default=None, description="Of the layer's output; see `Figures`.")
    output_sqnr_db: float | None = None
    output_relative_error: float | None = None
    bits_per_weight: float | None = None
    sums: ErrorSums | None = None
    time_groups: TimeGroups | None = Field(default=None, description="Where activation grids are stored.")


class ReportedFile(Wire):
    """A file of an output; its path is relative to the output."""

    path: str
    size_bytes: int
    sha256: str
    media_type: str


class BudgetPoint(Wire):
    """The least error at one size of an output."""

    bits_per_weight: float = Field(description="Of its quantized weights, everything counted.")
    size_bytes: int = Field(description="Of all its tensors, copied ones too.")
    relative_error: float = Field(
        description="Root of the mean of the squared relative errors of its quantized tensors, as far as rows of them "
        "were measured."
    )
    schemes: dict[str, int] = Field(description="How many tensors have which scheme.")


class Budget(Wire):
    """What `bit_width` auto has chosen under its target."""

    chosen: BudgetPoint
    is_exact: bool = Field(description="Whether no other choice of the candidates has less error within the target.")
    curve: list[BudgetPoint] = Field(description="The least error over size: what other targets would give.")


class OutputReport(Figures):
    """One output in full."""

    name: str
    format: str
    min_accuracy: float
    worst_tensors: list[str] = Field(description="Names, the lowest cosine similarity first, of the output if known.")
    tensors: list[TensorFigures]
    files: list[ReportedFile]
    budget: Budget | None = Field(default=None, description="With `bit_width` auto.")


class Report(Wire):
    """What a job measured."""

    kind: JobKind
    modality: str
    backend: str
    passed: bool
    quantization_time_s: float
    stages: dict[str, float] = Field(description="Seconds by part of the work, up to hashing; see `times` of the job.")
    stage_bytes: dict[str, int] = Field(description="Bytes by part: of the source, or written and hashed.")
    warnings: list[str]
    outputs: list[OutputReport]


class PlannedTensor(Wire):
    """What will happen to one tensor. One that is copied has the scheme `none`."""

    name: str
    shape: list[int]
    dtype: str
    scheme: str
    rule: str = Field(description="Why it is treated so.")
    original_bytes: int
    predicted_bytes: int
    method: str | None = None
    bit_width: int | None = None
    granularity: Granularity | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scale_dtype: str | None = None
    time_groups: int | None = Field(
        default=None, description="For how many groups of timesteps activation grids are stored, at most."
    )


class PlannedOutput(Wire):
    """What will happen in one output."""

    name: str
    format: str
    predicted_bytes: int
    config: ResolvedConfig
    tensors: list[PlannedTensor]
    budget: Budget | None = Field(default=None, description="With `bit_width` auto.")


class Estimate(Wire):
    """What the job will need, from rates measured on this machine."""

    seconds: float
    memory_bytes: int


class Plan(Wire):
    """What a job would do; making it reads headers only."""

    modality: str
    is_diffusion_model: bool
    backend: str
    source_bytes: int
    predicted: Estimate
    notes: list[str]
    outputs: list[PlannedOutput]
