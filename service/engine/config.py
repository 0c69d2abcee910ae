"""What can be asked of the engine, and how a profile, the environment and a request become one answer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from fnmatch import fnmatchcase, translate
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from typing_extensions import TypeAliasType

from service.engine.methods.registry import methods
from service.engine.schemes.base import Granularity, GroupSize, Scheme
from service.engine.schemes.nested import NestedScheme
from service.engine.schemes.registry import build_scheme, schemes
from service.errors import InvalidConfig

BitWidth = TypeAliasType("BitWidth", Literal[2, 3, 4, 5, 6, 8])
#: `auto` gives each tensor the scheme that serves the whole best under a target.
AUTO: Literal["auto"] = "auto"
BitWidthChoice = TypeAliasType("BitWidthChoice", Literal[2, 3, 4, 5, 6, 8, "auto"])
NumberFormat = TypeAliasType("NumberFormat", Literal["int", "nf"])
ScaleDtypeChoice = TypeAliasType("ScaleDtypeChoice", Literal["auto", "F32", "F16", "BF16"])
OnFailure = TypeAliasType("OnFailure", Literal["fallback", "fail", "warn"])
OnNonFinite = TypeAliasType("OnNonFinite", Literal["fail", "copy"])
#: Of groups with nested scales, which are small.
NESTED_SIZES = get_args(NestedScheme.model_fields["group_size"].annotation)
TimestepWeighting = TypeAliasType("TimestepWeighting", Literal["uniform", "snr_linear", "snr_cosine"])
TimestepWeights = TypeAliasType("TimestepWeights", TimestepWeighting | list[float])
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


def is_nested(scheme: str | None) -> bool:
    """Whether this id is of a scheme with nested scales."""
    return scheme is not None and issubclass(schemes().get(scheme, Scheme), NestedScheme)


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
    number_format: NumberFormat | None = Field(default=None, description="`int` or `nf` (4 bits only).")
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
        if self.number_format == "nf" and self.bit_width == AUTO:
            raise ValueError("`bit_width` auto chooses the number format too: name formats in `candidates`")
        if self.number_format == "nf" and self.bit_width not in (None, 4):
            raise ValueError("`number_format` nf has 4 bits: `bit_width` cannot be another")
        if (self.scheme == "nf4" or self.number_format == "nf") and self.symmetric is False:
            raise ValueError("nf4 has no zero point: `symmetric` cannot be false")
        if is_nested(self.scheme):
            self._check_nested()
        if self.group_size and self.granularity not in (None, "group"):
            raise ValueError(f"`group_size` goes with granularity group, not {self.granularity}")
        return self

    def _check_nested(self) -> None:
        if self.symmetric:
            raise ValueError(f"{self.scheme} has zero points: `symmetric` cannot be true")
        if self.granularity not in (None, "group") or self.group_size not in (None, *NESTED_SIZES):
            raise ValueError(f"{self.scheme} has groups of {' or '.join(map(str, NESTED_SIZES))}")

    def overridden_by(self, upper: TensorConfig) -> TensorConfig:
        """This, with the fields that `upper` sets; one way to name a thing replaces the other ways."""
        fields = self.tensor_fields()
        new = upper.tensor_fields()
        if "scheme" in new:
            fields.pop("bit_width", None), fields.pop("number_format", None)
        if new.keys() & {"bit_width", "number_format"}:
            fields.pop("scheme", None)
        if "bit_width" in new and new["bit_width"] != 4 and "number_format" not in new:
            fields.pop("number_format", None)
        if "number_format" in new and "bit_width" not in new and new["number_format"] == "nf":
            fields.pop("bit_width", None)
        if is_nested(new.get("scheme")):
            for name in ("granularity", "group_size", "symmetric"):
                fields.pop(name, None)
        if "granularity" in new and new["granularity"] != "group":
            fields.pop("group_size", None)
        if "group_size" in new and "granularity" not in new:
            fields["granularity"] = "group"
        fields.update(new)
        if (fields.get("scheme") == "nf4" or fields.get("number_format") == "nf") and "symmetric" not in new:
            fields.pop("symmetric", None)
        return TensorConfig(**fields)

    def tensor_fields(self) -> dict[str, Any]:
        """The fields above that are set."""
        return {k: v for k in TensorConfig.model_fields if (v := getattr(self, k)) is not None}


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
    num_time_groups: int | None = Field(default=None, ge=1, le=100)
    enable_time_aware: bool | None = None
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
    for override in resolved.layers or ():
        for candidate in candidates(tensor.overridden_by(override), resolved):
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
    """The scheme that a resolved tensor configuration means for a tensor of this dtype."""
    number_format = config.number_format or "int"
    id_ = config.scheme or ("nf4" if number_format == "nf" else f"int{config.bit_width}")
    granularity = config.granularity or "group"
    scale_dtype = config.scale_dtype or "auto"
    # Groups of nobody's choice are as the scheme has them.
    size = {} if granularity == "group" and not config.group_size else {"group_size": config.group_size}
    return _built(
        id_,
        symmetric=bool(config.symmetric) if id_ != "nf4" else True,
        granularity=granularity,
        **size if granularity == "group" else {"group_size": None},
        scale_dtype=AUTO_SCALE[dtype] if scale_dtype == "auto" else scale_dtype,
    )


@lru_cache(maxsize=256)  # a model has thousands of tensors and few schemes
def _built(id_: str, **parameters: Any) -> Scheme:
    return build_scheme(id_, **parameters)


#: Loaders multiply in the model's own dtype, so its scales are stored in that, or in F16 where it is wider.
AUTO_SCALE = {"F64": "F16", "F32": "F16", "F16": "F16", "BF16": "BF16"}
