"""What will happen to each tensor in each output, and which rule decided: headers times configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

from pydantic import ValidationError

from service.engine.activation_groups import group_bytes
from service.engine.backends.registry import choose_backend
from service.engine.calibration.calibration import DIVIDED_RANGE, RANGE, Calibration
from service.engine.calibration.feed import Averaging, Feed
from service.engine.choice import Choice, choose_method
from service.engine.config import (
    AUTO,
    DEFAULT_SKIP,
    ResolvedConfig,
    TensorConfig,
    build,
    candidates,
    matches,
)
from service.engine.formats.base import Format, FormatOptions, ModelLayout, ModelReader
from service.engine.formats.registry import find_format
from service.engine.methods.base import Method
from service.engine.methods.registry import methods
from service.engine.progress import Notice
from service.engine.records import record
from service.engine.report import Budget
from service.engine.schemes.base import ROW_MULTIPLE, ScaleDtype, Scheme
from service.engine.schemes.integer import IntegerScheme
from service.engine.schemes.registry import schemes
from service.engine.schemes.table import TableScheme
from service.engine.tensors import DTYPE_BITS, TensorInfo, low_rank_bytes
from service.engine.timesteps import timestep_weights
from service.errors import AlreadyQuantized, InvalidConfig, UnsupportedByFormat

MIN_ELEMENTS = 4096
GROUP_SIZES = (256, 128, 64, 32, 16)
#: A tensor is worked on in blocks of a multiple of some rows, and copied where so many are longer than that many bytes:
#: no weight matrix is, and memory is to follow the block.
MAX_SMALLEST_BLOCK_BYTES = 256 << 20
#: Bytes of what a column of inputs is divided by.
SCALE_BYTES = 4
#: What calibration tells of a layer, as `Layer.tells` has it; None where a job has no calibration.
Tells = frozenset[str] | None
#: Layers that a warning names.
NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """An output as asked for."""

    name: str
    format: str
    config: ResolvedConfig
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """An output with its format looked up and its options checked."""

    name: str
    format: type[Format]
    options: FormatOptions
    config: ResolvedConfig
    steps: int = 0  # timesteps of the calibration, if there is one

    @property
    def groups_time(self) -> bool:
        """Whether activation grids are wanted and kept."""
        return self.config.time_groups is not None and "time_group_bounds" in self.format.keeps


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one tensor in one output: quantized when `scheme` is set, copied otherwise.

    `rule` is the reason in words; `notable` tells that a user who asked for this tensor to be
    quantized may not expect it.
    """

    rule: str
    scheme: Scheme | None = None
    method: Method | None = None
    notable: bool = False
    auto_scale: bool = False  # the scale dtype may be changed
    missing: str | None = None  # what its calibration lacks
    time_groups: int = 0  # of timesteps, at most, for which an activation grid is stored

    @property
    def way(self) -> tuple[Scheme, Method] | None:
        """How the tensor is quantized, if it is: tensors of one way may be quantized together."""
        return (self.scheme, self.method) if self.scheme is not None and self.method is not None else None


@record(frozen=True, slots=True)
class TensorPlan:
    """A tensor with a decision for each output, in their order."""

    info: TensorInfo
    decisions: tuple[Decision, ...]
    tells: Tells = None

    @property
    def is_fed(self) -> bool:
        """Whether its inputs are known, and of use."""
        return bool(self.tells) and any(decision.scheme for decision in self.decisions)

    @property
    def row_multiple(self) -> int:
        """Rows are read in pieces of a multiple of so many."""
        return max((d.scheme.row_multiple for d in self.decisions if d.scheme), default=ROW_MULTIPLE)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run will do; making it reads headers only."""

    layout: ModelLayout
    source_format: str
    outputs: tuple[OutputPlan, ...]
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...]
    warnings: tuple[Notice, ...]
    #: Of each output what was chosen under its target, if it has one; empty as long as nothing was.
    budgets: tuple[Budget | None, ...] = ()
    feed: Feed | None = None  # of a calibration that is open as long as the run

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors as the source stores them."""
        return sum(t.info.nbytes for t in self.tensors)

    def quantized(self, output: int) -> int:
        """How many tensors an output quantizes."""
        return sum([t.decisions[output].scheme is not None for t in self.tensors])

    def predicted_bytes(self, output: int) -> int:
        """Bytes of the tensors in an output if no fallback is taken, without headers and companions."""
        about = self.outputs[output]
        return sum(stored_bytes(t.info, t.decisions[output], about) for t in self.tensors)


def check_outputs(outputs: Sequence[OutputSpec], *, is_calibrated: bool = False) -> tuple[OutputPlan, ...]:
    """Look up formats, check options, schemes and methods: all that can be refused without opening the model.

    Raises InvalidConfig or UnsupportedByFormat with a pointer into the request's `outputs`.
    """
    names = Counter(spec.name for spec in outputs)
    if twice := [name for name, n in names.items() if n > 1]:
        raise InvalidConfig(f"two outputs are named {twice[0]!r}; give one of them another `name`", pointer="/outputs")
    if len({spec.config.backend for spec in outputs}) > 1:
        raise InvalidConfig("all outputs of a job are computed by one backend; set it in `config`", pointer="/outputs")
    choose_backend(outputs[0].config.backend or "auto")
    return tuple(_check_output(index, spec, is_calibrated) for index, spec in enumerate(outputs))


def make_plan(reader: ModelReader, outputs: Sequence[OutputSpec], calibration: Calibration | None = None) -> Plan:
    """Decide for every tensor of the model what each output does with it.

    Tensors whose width is `auto` have the largest of their candidates: `budget.within_budgets` knows more.
    Raises what `check_outputs` raises, AlreadyQuantized when the model's weights are codes, and InvalidCalibration
    when the calibration is not the model's.
    """
    steps = 0 if calibration is None else len(calibration.timesteps)
    checked = tuple(
        replace(output, steps=steps) for output in check_outputs(outputs, is_calibrated=calibration is not None)
    )
    feed = None if calibration is None else make_feed([output.config for output in checked], calibration)
    if coded := next((t for t in reader.tensors if t.stored_as), None):
        raise AlreadyQuantized(
            f"tensor {coded.name} is stored as {coded.stored_as} ({reader.format_id}); give the original weights",
            tensor=coded.name,
        )
    tensors = tuple(_plan_of(info, checked, calibration) for info in reader.tensors)
    warnings = tuple(_warnings(checked, tensors, calibration))
    return Plan(reader.layout, reader.format_id, checked, tensors, _notes(checked, tensors, feed), warnings, feed=feed)


def _plan_of(info: TensorInfo, outputs: Sequence[OutputPlan], calibration: Calibration | None) -> TensorPlan:
    layer = None if calibration is None or _not_quantizable(info) else calibration.layer(info)
    tells = None if calibration is None else layer.tells if layer else frozenset[str]()
    return TensorPlan(info, tuple(decide(info, output, tells) for output in outputs), tells)


def decide(info: TensorInfo, output: OutputPlan, tells: Tells = None) -> Decision:
    """The rule that holds for this tensor in this output; of those that it may choose from the largest."""
    return choices(info, output, tells)[-1]


def choices(info: TensorInfo, output: OutputPlan, tells: Tells = None) -> list[Decision]:
    """What may be done with this tensor in this output, by size: one thing, unless its width is `auto`."""
    if reason := _not_quantizable(info):
        return [_copied(reason)]
    config, override = output.config.tensor_config(info.name)
    if config.bit_width != AUTO:
        return [_decide(info, output, config, override, tells)]
    asked = [each for each in candidates(config, output.config) if _is_held(each, output)]
    options = [_decide(info, output, each, override, tells) for each in asked]
    held = {option.scheme: option for option in options if option.scheme is not None}
    return sorted(held.values(), key=lambda option: stored_bytes(info, option, output)) or options[:1]


def _decide(info: TensorInfo, output: OutputPlan, config: TensorConfig, override: str | None, tells: Tells) -> Decision:
    # An override that names a tensor means it; otherwise the skip patterns come first.
    if override is None and (skipped := output.config.skips(info.name)) is not None:
        return _copied(f"skip pattern {skipped!r}")
    whole = _built(config, info.dtype)
    if _is_too_wide(info, whole):
        return Decision(f"rows of {info.cols} elements are too long", notable=True)
    scheme, regrouped = fit_group(whole, info.cols, output.format)
    if scheme is None:
        return Decision(str(regrouped), notable=True)
    if refusal := output.format.refuses_tensor(info, scheme):
        return Decision(f"{output.format.id} cannot hold it: {refusal}", notable=True)
    if scheme.stored_bytes(info.rows, info.cols) >= info.nbytes:
        return Decision(f"{scheme.id} with its scales would take no fewer bytes", notable=True)
    rule = f"layers pattern {override!r}" if override is not None else f"profile {output.config.profile}"
    rule = f"{rule}; {regrouped}" if regrouped else rule
    choice = choose_method(config.method or "minmax", tells, config.svd_rank)
    rank = choice.method.low_rank
    if rank and not _is_worth(rank, scheme, info):
        method = choice.method.quantizes_as
        choice = Choice(method, f"too small for a low-rank part of rank {rank}: {method.id} alone", choice.missing)
    rule = f"{rule}; {choice.reason}" if choice.reason else rule
    auto_scale = config.scale_dtype in (None, "auto") and "F32" in scheme.choices("scale_dtype")
    groups = _time_groups(choice.method, output, tells)
    return _quantized(rule, scheme, choice, bool(regrouped), auto_scale, groups)


def _time_groups(method: Method, output: OutputPlan, tells: Tells) -> int:
    """For how many groups of timesteps at most a grid is stored for the inputs of a layer."""
    wanted = output.config.time_groups
    if wanted is None or not output.groups_time or not tells:
        return 0
    return wanted.most_groups(output.steps) if (DIVIDED_RANGE if method.scales_inputs else RANGE) in tells else 0


def _is_worth(rank: int, scheme: Scheme, info: TensorInfo) -> bool:
    """Whether a low-rank part is smaller than the matrix, and both it and the codes than the tensor."""
    stored = scheme.stored_bytes(info.rows, info.cols) + low_rank_bytes(info.rows, info.cols, rank)
    return rank < min(info.rows, info.cols) and stored < info.nbytes


@lru_cache(maxsize=256)  # a model has thousands of tensors and few configurations
def _built(config: TensorConfig, dtype: str) -> Scheme:
    return build(config, dtype)


@lru_cache(maxsize=256)
def _copied(rule: str) -> Decision:
    """One for all that are copied for the same reason: comparing them then takes no look at their fields."""
    return Decision(rule)


@lru_cache(maxsize=256)
def _quantized(rule: str, scheme: Scheme, choice: Choice, notable: bool, auto_scale: bool, groups: int) -> Decision:
    """Likewise."""
    return Decision(rule, scheme, choice.method, notable, auto_scale, choice.missing, groups)


def fit_group(scheme: Scheme, cols: int, format_: type[Format]) -> tuple[Scheme | None, str | None]:
    """The scheme with a group size that the row length and the format allow, and what was changed.

    None, and why, where it has no other groups.
    """
    size = scheme.group_size
    if scheme.granularity != "group" or size is None or cols % size == 0 or format_.short_groups:
        return scheme, None
    if scheme.choices("granularity") == ("group",):
        return None, f"rows of {cols} are not whole groups of {size}, of which {format_.id} makes {scheme.id}"
    smaller = next((g for g in GROUP_SIZES if g < size and cols % g == 0), None)
    if smaller is None:
        return with_group(scheme, None), f"no group size divides rows of {cols}: one scale per channel"
    return with_group(scheme, smaller), f"group size {size} does not divide rows of {cols}: {smaller} instead"


def with_group(scheme: Scheme, size: int | None) -> Scheme:
    """The same scheme with another group size, or per channel when it is None."""
    changed = {"granularity": "group" if size else "channel", "group_size": size}
    return type(scheme).model_validate(scheme.model_dump() | changed)


def with_scale(scheme: Scheme, dtype: ScaleDtype) -> Scheme:
    """The same scheme with its scales in another dtype."""
    return type(scheme).model_validate(scheme.model_dump() | {"scale_dtype": dtype})


def _check_output(index: int, spec: OutputSpec, is_calibrated: bool) -> OutputPlan:
    pointer = f"/outputs/{index}"
    format_ = find_format(spec.format, pointer=f"{pointer}/format")
    if not format_.can_write:
        raise UnsupportedByFormat(f"format {spec.format!r} can only be read", pointer=f"{pointer}/format")
    try:
        options = format_.options.model_validate(spec.options)
    except ValidationError as error:
        first = error.errors()[0]
        where = "/".join(str(part) for part in first["loc"])
        raise InvalidConfig(f"option {where}: {first['msg']}", pointer=f"{pointer}/options/{where}") from error
    resolved = _with_symmetry(spec.config, format_)
    bases = [TensorConfig(**resolved.tensor_fields())]
    bases += [bases[0].overridden_by(override) for override in resolved.layers or ()]
    for config in bases:
        if not is_calibrated:
            choose_method(config.method or "minmax", None)
        asked = candidates(config, resolved)
        refused = {(s := build(each, "F32")).id: format_.refuses_scheme(s, options) for each in asked}
        reason = next((f"{id_}: {text}" for id_, text in refused.items() if text), None)
        # Candidates that nobody has named are those that the format holds.
        if reason and (config.bit_width != AUTO or resolved.candidates or all(refused.values())):
            raise UnsupportedByFormat(f"{spec.format} cannot hold {reason}", pointer=f"{pointer}/format")
        if config.method in scaling_methods() and "input_scale" not in format_.keeps:
            raise UnsupportedByFormat(
                f"{spec.format} cannot hold what {config.method} has the inputs of a layer divided by, for its loaders"
                " do not divide them: choose `parquet`, or another method",
                pointer=f"{pointer}/format",
            )
        if config.method in low_rank_methods() and "low_rank_down" not in format_.keeps:
            raise UnsupportedByFormat(
                f"{spec.format} cannot hold the low-rank part that {config.method} takes from the weights, for its"
                " loaders do not add it: choose `parquet`, or another method",
                pointer=f"{pointer}/format",
            )
    return OutputPlan(spec.name, format_, options, resolved)


@cache
def scaling_methods() -> frozenset[str]:
    """The ids of methods that have a layer's inputs divided."""
    return frozenset(id_ for id_, cls in methods().items() if cls.scales_inputs)


@cache
def low_rank_methods() -> frozenset[str]:
    """The ids of methods that store a low-rank part of the weights beside the codes."""
    return frozenset(id_ for id_, cls in methods().items() if cls().low_rank)


def _with_symmetry(config: ResolvedConfig, format_: type[Format]) -> ResolvedConfig:
    """Nothing said about zero points means what the format's loaders read best, where the scheme leaves a choice."""
    scheme = schemes()[config.named or "int8"]
    # A table of values has no zero points; integers that stand in for it in some layers could.
    without = issubclass(scheme, TableScheme) and format_.prefers_symmetric
    if config.symmetric is not None or not (without or issubclass(scheme, IntegerScheme)):
        return config
    return ResolvedConfig.model_validate(dict(config) | {"symmetric": format_.prefers_symmetric})


def _not_quantizable(info: TensorInfo) -> str | None:
    if not info.is_float:
        return f"dtype {info.dtype} is not quantized"
    if len(info.shape) < 2:
        return "fewer than two dimensions"
    if info.size < MIN_ELEMENTS:
        return f"fewer than {MIN_ELEMENTS} elements"
    return None


def _is_too_wide(info: TensorInfo, scheme: Scheme) -> bool:
    row_bytes = info.cols * DTYPE_BITS[info.dtype] // 8
    return min(info.rows, scheme.row_multiple) * row_bytes > MAX_SMALLEST_BLOCK_BYTES


def _is_held(config: TensorConfig, output: OutputPlan) -> bool:
    return output.format.refuses_scheme(build(config, "F32"), output.options) is None


def stored_bytes(info: TensorInfo, decision: Decision, output: OutputPlan) -> int:
    """What the tensor takes in this output, without headers."""
    if decision.scheme is None:
        return info.nbytes
    beside = group_bytes(decision.time_groups)
    if decision.method is not None:
        beside += SCALE_BYTES * info.cols if decision.method.scales_inputs else 0
        beside += low_rank_bytes(info.rows, info.cols, decision.method.low_rank)
    return output.format.stored_bytes(info, decision.scheme, output.options) + beside


def make_feed(configs: Sequence[ResolvedConfig], calibration: Calibration) -> Feed:
    """What reads the calibration as the configurations of all outputs, alike, want it; raises InvalidConfig."""
    first, *others = configs
    wanted = (first.calibration_samples, first.timestep_weights)
    if any((other.calibration_samples, other.timestep_weights) != wanted for other in others):
        detail = "all outputs of a job are calibrated alike; set samples and weights of timesteps in `config`"
        raise InvalidConfig(detail, pointer="/outputs")
    weights = timestep_weights(first.timestep_weights or "uniform", calibration.timesteps)
    return Feed(calibration, Averaging(weights, first.calibration_samples or 1))


def _notes(outputs: Sequence[OutputPlan], tensors: Sequence[TensorPlan], feed: Feed | None) -> tuple[str, ...]:
    if feed is None and any(o.config.enable_time_aware or o.config.enable_spatial for o in outputs):
        return ("time-aware and spatial steps are left out: they need calibration data, and none was given",)
    if feed is None or not any(o.config.enable_time_aware for o in outputs):
        return ()
    if not any(RANGE in (tensor.tells or ()) for tensor in tensors):
        return (f"time-aware steps are left out: the calibration has no `{RANGE}` of the inputs of any layer",)
    return tuple(
        f"output {o.name}: time-aware steps are left out, for {o.format.id} does not keep activation scales"
        for o in outputs
        if o.config.enable_time_aware and not o.groups_time
    )


def _warnings(
    outputs: Sequence[OutputPlan], tensors: Sequence[TensorPlan], calibration: Calibration | None
) -> Iterator[Notice]:
    """What a user hardly meant: nothing to quantize, patterns that name nothing, and calibration of no layer of it."""
    if calibration is not None and (strange := calibration.unmatched(tensor.info for tensor in tensors)):
        text = f"the model has no tensors for layers of the calibration: {_some(strange)}"
        yield Notice("calibration_unmatched", text)
    for index, output in enumerate(outputs):
        if output.groups_time and (ungrouped := [t.info.name for t in tensors if _is_ungrouped(t, index)]):
            text = (
                f"output {output.name}: no activation scales for layers whose inputs are divided, for the calibration"
            )
            yield Notice("time_groups_left_out", f"{text} does not tell their `absmax`: {_some(ungrouped)}")
        if all(tensor.decisions[index].scheme is None for tensor in tensors):
            yield Notice("nothing_quantized", f"output {output.name}: no tensor is quantized, all are copied")
        patterns = [override.match for override in output.config.layers or ()]
        patterns += [pattern for pattern in output.config.skip or () if pattern not in DEFAULT_SKIP]
        for pattern in patterns:
            if not any(matches(tensor.info.name, pattern) for tensor in tensors):
                yield Notice("pattern_unmatched", f"output {output.name}: no tensor is named {pattern!r}")


def _is_ungrouped(tensor: TensorPlan, output: int) -> bool:
    """Whether a layer has no activation grids, though the range of its inputs is known."""
    decision = tensor.decisions[output]
    return decision.scheme is not None and RANGE in (tensor.tells or ()) and not decision.time_groups


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:NAMES_SHOWN])}{', …' if len(names) > NAMES_SHOWN else ''}"
