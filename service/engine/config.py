"""What can be asked of the engine, and how a profile, the environment and a request become one answer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from fnmatch import fnmatchcase, translate
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from typing_extensions import TypeAliasType

from service.engine.activation_groups import ACTIVATION_BITS, TimeGrouping, Wanted
from service.engine.methods.base import MAX_RANK, MIN_RANK
from service.engine.methods.registry import methods
from service.engine.schemes.base import Granularity, GroupSize, Scheme
from service.engine.schemes.nested import NestedScheme
from service.engine.schemes.registry import build_scheme, schemes
from service.engine.schemes.table import TableScheme
from service.engine.time_smoothing import Interpolation
from service.errors import InvalidConfig

BitWidth = TypeAliasType("BitWidth", Literal[2, 3, 4, 5, 6, 8])
#: `auto` gives each tensor the scheme that serves the whole best under a target.
AUTO: Literal["auto"] = "auto"
BitWidthChoice = TypeAliasType("BitWidthChoice", Literal[2, 3, 4, 5, 6, 8, "auto"])
ActivationBits = TypeAliasType("ActivationBits", Literal[4, 5, 6, 8])
NumberFormat = TypeAliasType("NumberFormat", Literal["int", "nf", "fp"])
ScaleDtypeChoice = TypeAliasType("ScaleDtypeChoice", Literal["auto", "F32", "F16", "BF16"])
OnFailure = TypeAliasType("OnFailure", Literal["fallback", "fail", "warn"])
OnNonFinite = TypeAliasType("OnNonFinite", Literal["fail", "copy"])
TimestepWeighting = TypeAliasType("TimestepWeighting", Literal["uniform", "snr_linear", "snr_cosine"])
TimestepWeights = TypeAliasType("TimestepWeights", TimestepWeighting | list[float])
#: Schemes that go by number format and width, beside the integers.
BY_FORMAT: dict[tuple[str, int | str], str] = {("nf", 4): "nf4", ("fp", 4): "fp4", ("fp", 8): "fp8_e4m3"}
#: Above this all groups have one scale, whatever that costs; and no schedule has as many steps.
MOST_SMOOTHNESS, MOST_WINDOW = 1e6, 1000
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=512)]

#: The sensitive layers: embeddings, norms, output heads; of a diffusion model also its first and last layers.
DEFAULT_SKIP = (
    "*embed*", "*wte.*", "*wpe.*", "*shared.weight",
    "*norm.weight", "*norm?.weight", "*layernorm*", "*LayerNorm*", "*.ln_*",
    "*lm_head*", "*classifier.*", "*score.weight",
    "*conv_in.*", "*conv_out.*", "proj_out.*", "*final_layer*",
)  # fmt: skip


def _one_of(value: str | None, known: Iterable[str]) -> str | None:
    names = list(known)
    if value is not None and value not in names:
        raise ValueError(f"{value!r} does not exist; there are {', '.join(names)}")
    return value


class Profile(StrEnum):
    """ArrowQuant's three sets of defaults."""

    EDGE = "edge"
    LOCAL = "local"
    CLOUD = "cloud"


class TensorConfig(BaseModel):
    """How one tensor is quantized. What is unset comes from the layer below."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bit_width: BitWidthChoice | None = Field(
        default=None,
        description="Bits per code. `auto` chooses for each tensor, within `target_bits_per_weight` or "
        "`target_size_bytes`.",
    )
    scheme: str | None = Field(default=None, description="A scheme named whole, one of `/v1/schemes`.")
    number_format: NumberFormat | None = Field(default=None, description="`int`, `nf` (4 bits) or `fp` (4 or 8 bits).")
    granularity: Granularity | None = Field(default=None, description="What shares one scale.")
    group_size: GroupSize | None = Field(default=None, description="Elements of a row that share one scale.")
    symmetric: bool | None = Field(
        default=None,
        description="Whether to do without zero points. By default what loaders of the output format read best.",
    )
    scale_dtype: ScaleDtypeChoice | None = Field(default=None, description="`auto` follows the tensor's dtype.")
    method: str | None = Field(
        default=None,
        description="How scales are found, one of `/v1/methods`; `auto` is the best that a layer's calibration allows.",
    )

    svd_rank: int | None = Field(
        default=None,
        ge=MIN_RANK,
        le=MAX_RANK,
        description="With method `svd`: the rank of the part of the weights that is stored in 16 bits; 32 by default.",
    )

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, value: str | None) -> str | None:
        return _one_of(value, schemes())

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str | None) -> str | None:
        return _one_of(value, (AUTO, *methods()))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.scheme and (self.bit_width or self.number_format):
            raise ValueError("`scheme` names format and width: leave out `bit_width` and `number_format`")
        widths = _widths(self.number_format)
        if widths and self.bit_width == AUTO:
            raise ValueError("`bit_width` auto chooses the number format too: name formats in `candidates`")
        if widths and self.bit_width not in (None, *widths):
            has = " or ".join(str(width) for width in widths)
            raise ValueError(f"`number_format` {self.number_format} has {has} bits: `bit_width` cannot be another")
        if self.svd_rank and self.method not in (None, "svd"):
            raise ValueError(f"`svd_rank` goes with method svd, not {self.method}: set `method`, or leave it out")
        if self.group_size and self.granularity not in (None, "group"):
            raise ValueError(f"`group_size` goes with granularity group, not {self.granularity}")
        if (named := self.named) and (reason := _clash(named, self.tensor_fields())):
            raise ValueError(reason)
        return self

    @property
    def named(self) -> str | None:
        """The scheme that is named, whole or by its number format; None for integers of some width."""
        if self.scheme is not None or self.number_format is None:
            return self.scheme
        widths = _widths(self.number_format)
        return BY_FORMAT.get((self.number_format, self.bit_width or (widths[0] if len(widths) == 1 else 0)))

    def overridden_by(self, upper: TensorConfig) -> TensorConfig:
        """This, with the fields that `upper` sets; one way to name a thing replaces the other ways."""
        fields = self.tensor_fields()
        new = upper.tensor_fields()
        if "scheme" in new:
            fields.pop("bit_width", None), fields.pop("number_format", None)
        if new.keys() & {"bit_width", "number_format"}:
            fields.pop("scheme", None)
        widths = _widths(fields.get("number_format"))
        if "bit_width" in new and "number_format" not in new and new["bit_width"] not in widths:
            fields.pop("number_format", None)
        if "number_format" in new and "bit_width" not in new and new["number_format"] == "nf":
            fields.pop("bit_width", None)
        if "granularity" in new and new["granularity"] != "group":
            fields.pop("group_size", None)
        if "group_size" in new and "granularity" not in new:
            fields["granularity"] = "group"
        if "method" in new and "svd_rank" not in new:
            fields.pop("svd_rank", None)
        fields.update(new)
        named = TensorConfig.model_construct(**fields).named
        for field in ("granularity", "group_size", "scale_dtype", "symmetric"):
            # What was meant for another scheme.
            if named and field in fields and field not in new and _clash(named, {field: fields[field]}):
                del fields[field]
        return TensorConfig(**fields)

    def tensor_fields(self) -> dict[str, Any]:
        """The fields above that are set."""
        return {k: v for k in TensorConfig.model_fields if (v := getattr(self, k)) is not None}


def _widths(number_format: str | None) -> list[int | str]:
    """The widths of a number format that does not have them all."""
    return [width for name, width in BY_FORMAT if name == number_format]


def _clash(scheme: str, fields: dict[str, Any]) -> str | None:
    """Why a scheme cannot have these settings, or None."""
    cls = schemes()[scheme]
    if fields.get("symmetric") is False and issubclass(cls, TableScheme):
        return f"{scheme} has no zero point: `symmetric` cannot be false"
    if fields.get("symmetric") is True and issubclass(cls, NestedScheme):
        return f"{scheme} has zero points: `symmetric` cannot be true"
    for field in ("granularity", "group_size", "scale_dtype"):
        value, choices = fields.get(field), cls.choices(field)
        if value in (None, "auto", *choices):
            continue
        if not choices:
            return f"{scheme} has no groups: leave out `{field}`"
        return f"`{field}` of {scheme} is {' or '.join(str(choice) for choice in choices)}, not {value}"
    return None


class LayerOverride(TensorConfig):
    """Settings for the tensors whose name matches; of several overrides the first match wins."""

    match: Pattern = Field(description="Shell pattern over tensor names, such as `blocks.*.attn.*`.")


class QuantizationConfig(TensorConfig):
    """What a request may set; what is unset comes from the profile."""

    skip: list[Pattern] | None = Field(default=None, description="Patterns of tensors to copy; replaces the defaults.")
    layers: list[LayerOverride] | None = Field(default=None, description="Overrides by tensor name.")
    min_accuracy: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Cosine similarity, of each and of all; of the outputs where calibration has a Gram matrix.",
    )
    on_failure: OnFailure | None = Field(default=None, description="What to do with a tensor under `min_accuracy`.")
    on_non_finite: OnNonFinite | None = Field(default=None, description="What to do with a NaN or an infinity.")
    backend: str | None = Field(default=None, description="Where to compute: `auto`, or one of `/v1/backends`.")
    num_time_groups: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="How many groups of timesteps have an activation grid of their own; no more than the calibration "
        "has timesteps.",
    )
    enable_time_aware: bool | None = Field(
        default=None,
        description="Whether grids for the inputs of layers are stored by groups of timesteps, where calibration has "
        "their ranges and the format keeps them (`parquet`).",
    )
    activation_bit_width: ActivationBits | None = Field(
        default=None,
        description="Bits of the grids for inputs, 8 by default; with fewer they leave out what is rare, where "
        "calibration has the `mean_square` of a layer.",
    )
    time_grouping: TimeGrouping | None = Field(
        default=None, description="Where timesteps are cut: with the least expected error, or at like distances."
    )
    smoothness_weight: float | None = Field(
        default=None,
        ge=0,
        le=MOST_SMOOTHNESS,
        description="How much a jump between the scales of neighbouring groups counts against their error; 0 leaves "
        "them as they are.",
    )
    boundary_window: int | None = Field(
        default=None,
        ge=0,
        le=MOST_WINDOW,
        description="On either side of a cut so many timesteps get grids between those of both groups.",
    )
    boundary_interpolation: Interpolation | None = Field(
        default=None, description="How the grids in a `boundary_window` go over into each other."
    )
    enable_spatial: bool | None = None
    calibration_samples: int | None = Field(
        default=None, ge=1, description="How many raw samples of each layer and timestep are used at most."
    )
    timestep_weights: TimestepWeights | None = Field(
        default=None,
        description="How much each timestep of the calibration counts: `uniform`, by the signal-to-noise ratio up to 5 "
        "of a schedule of 1000 steps (`snr_linear`, `snr_cosine`), or a number for each.",
    )
    target_bits_per_weight: float | None = Field(
        default=None,
        gt=0,
        le=64,
        description="With `bit_width` auto: what the quantized weights may take on average, scales and all counted.",
    )
    target_size_bytes: int | None = Field(
        default=None,
        ge=1,
        description="With `bit_width` auto: what all tensors of the output may take, copied ones too.",
    )
    candidates: list[str] | None = Field(
        default=None,
        min_length=1,
        description="What `bit_width` auto chooses from, of `/v1/schemes`; by default all integers that the format "
        "holds.",
    )

    @field_validator("candidates")
    @classmethod
    def _known_candidates(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            _one_of(name, schemes())
        return value

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.target_bits_per_weight is not None and self.target_size_bytes is not None:
            raise ValueError("`target_bits_per_weight` and `target_size_bytes` exclude each other: leave one out")
        return self


class ResolvedConfig(QuantizationConfig):
    """A configuration with nothing left open, and the profile it came from."""

    profile: Profile

    @property
    def is_auto(self) -> bool:
        """Whether there are tensors whose scheme is to be chosen under a target."""
        return any(config.bit_width == AUTO for config in (self, *(self.layers or ())))

    @property
    def time_groups(self) -> Wanted | None:
        """How timesteps are to be grouped, if they are."""
        if not self.enable_time_aware:
            return None
        return Wanted(
            count=self.num_time_groups or 1,
            grouping=self.time_grouping or "optimal",
            smoothness_weight=self.smoothness_weight or 0.0,
            boundary_window=self.boundary_window or 0,
            boundary_interpolation=self.boundary_interpolation or "linear",
            bits=self.activation_bit_width or ACTIVATION_BITS,
        )

    def tensor_config(self, name: str) -> tuple[TensorConfig, str | None]:
        """What holds for the tensor of this name, and the pattern of the override that decided, if any."""
        for override in self.layers or ():
            if matches(name, override.match):
                return self._base.overridden_by(override), override.match
        return self._base, None

    def skips(self, name: str) -> str | None:
        """The first of the patterns in `skip` that matches, if one does."""
        if not self.skip or not self._skipped.match(name):
            return None
        return next(pattern for pattern in self.skip if matches(name, pattern))

    @cached_property
    def _base(self) -> TensorConfig:
        return TensorConfig(**self.tensor_fields())

    @cached_property
    def _skipped(self) -> re.Pattern[str]:
        """All patterns in `skip` as one: most names match none, and it is asked of every tensor."""
        return re.compile("|".join(map(translate, self.skip or ())))


def matches(name: str, pattern: str) -> bool:
    """Shell matching, case-sensitive; `*` also matches dots."""
    return fnmatchcase(name, pattern)


PROFILES: dict[Profile, QuantizationConfig] = {
    Profile.EDGE: QuantizationConfig(
        bit_width=2, group_size=256, min_accuracy=0.65, num_time_groups=5, enable_spatial=False, calibration_samples=32
    ),
    Profile.LOCAL: QuantizationConfig(
        bit_width=4, group_size=128, min_accuracy=0.85, num_time_groups=10, enable_spatial=True, calibration_samples=128
    ),
    Profile.CLOUD: QuantizationConfig(
        bit_width=8, group_size=64, min_accuracy=0.95, num_time_groups=20, enable_spatial=True, calibration_samples=512
    ),
}
COMMON_DEFAULTS = QuantizationConfig(
    granularity="group",
    scale_dtype="auto",
    method="mse",
    skip=list(DEFAULT_SKIP),
    layers=[],
    on_failure="fallback",
    on_non_finite="fail",
    backend="auto",
    enable_time_aware=True,
    time_grouping="optimal",
    smoothness_weight=0.0,
    boundary_window=0,
    boundary_interpolation="linear",
)


def resolve(profile: Profile, layers: Iterable[QuantizationConfig | None]) -> ResolvedConfig:
    """Defaults < profile < each of `layers` in turn (environment, request, output).

    Raises InvalidConfig when the layers contradict each other.
    """
    try:
        return _resolve(profile, layers)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InvalidConfig(
            f"the settings of profile, environment and request clash: {message}", pointer="/config"
        ) from error


def _resolve(profile: Profile, layers: Iterable[QuantizationConfig | None]) -> ResolvedConfig:
    tensor = TensorConfig()
    other: dict[str, Any] = {}
    for layer in (COMMON_DEFAULTS, PROFILES[profile], *layers):
        if layer is not None:
            tensor = tensor.overridden_by(layer)
            new = {
                k: v
                for k in layer.model_fields_set - TensorConfig.model_fields.keys()
                if (v := getattr(layer, k)) is not None
            }
            if TARGETS & new.keys() or not {layer.scheme, layer.bit_width} <= {None, AUTO}:
                # What is said now of widths replaces what was said of targets before.
                other = {k: v for k, v in other.items() if k not in TARGETS}
            other |= new
    resolved = ResolvedConfig(profile=profile, **tensor.tensor_fields(), **other)
    _check_target(resolved)
    for config in (tensor, *(tensor.overridden_by(override) for override in resolved.layers or ())):
        for candidate in candidates(config, resolved):
            build(candidate, "F32")
    return resolved


#: What `auto` has to stay within.
TARGETS = frozenset({"target_bits_per_weight", "target_size_bytes"})


def _check_target(config: ResolvedConfig) -> None:
    target = next((name for name in sorted(TARGETS) if getattr(config, name) is not None), None)
    if config.is_auto and target is None:
        raise InvalidConfig(
            "`bit_width` auto needs a target: set `target_bits_per_weight` or `target_size_bytes`",
            pointer="/config/bit_width",
        )
    if target is not None and not config.is_auto:
        raise InvalidConfig(f"`{target}` goes with `bit_width` auto", pointer=f"/config/{target}")


def candidates(config: TensorConfig, whole: ResolvedConfig) -> list[TensorConfig]:
    """The configurations that a tensor's own one stands for: one, unless its width is `auto`."""
    if config.bit_width != AUTO:
        return [config]
    names = whole.candidates or AUTO_CANDIDATES
    return [config.overridden_by(TensorConfig(scheme=name)) for name in names]


#: What `auto` chooses from where nothing is said.
AUTO_CANDIDATES = ("int2", "int3", "int4", "int5", "int6", "int8")


def build(config: TensorConfig, dtype: str) -> Scheme:
    """The scheme that a resolved tensor configuration means for a tensor of this dtype; raises InvalidConfig."""
    id_ = config.named or f"int{config.bit_width}"
    if reason := _clash(id_, config.tensor_fields()):
        raise InvalidConfig(reason, pointer="/config")
    cls = schemes()[id_]
    granularity = config.granularity or cls.model_fields["granularity"].default
    parameters = {"granularity": granularity, "group_size": config.group_size if granularity == "group" else None}
    if granularity == "group" and config.group_size is None:
        del parameters["group_size"]
    return _built(
        id_,
        symmetric=issubclass(cls, TableScheme) or bool(config.symmetric),
        scale_dtype=cls.usual_scale(dtype) if config.scale_dtype in (None, "auto") else config.scale_dtype,
        **parameters,
    )


@lru_cache(maxsize=256)  # a model has thousands of tensors and few schemes
def _built(id_: str, **parameters: Any) -> Scheme:
    return build_scheme(id_, **parameters)
