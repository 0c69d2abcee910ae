"""Whether what became of a tensor is good enough, and what to try next where it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from service.engine.attempt import Attempt
from service.engine.config import ResolvedConfig
from service.engine.formats.base import Format
from service.engine.metrics import ErrorSums
from service.engine.plan import Decision, OutputPlan, with_scale
from service.engine.progress import Notice
from service.engine.schemes.base import BLOCK, SCALE_RANGES, Scheme
from service.engine.schemes.nested import NestedScheme
from service.engine.schemes.registry import build_scheme, schemes
from service.engine.tensors import TensorInfo, non_finite
from service.errors import AccuracyTooLow

#: Widths that `on_failure: fallback` climbs.
FALLBACK_BITS = (2, 3, 4, 6, 8)

Warn = Callable[[Notice], None]


def judge(attempt: Attempt, info: TensorInfo, output: OutputPlan, warn: Warn) -> Decision | None:
    """What to try instead, or None when the attempt stands.

    Raises AccuracyTooLow where the configuration says `fail`.
    """
    scheme = attempt.decision.scheme
    if scheme is None:
        return None
    config, name, where = output.config, info.name, output.name
    if not attempt.sums.finite:
        warn(Notice("non_finite_copied", f"{non_finite(info)}: copied as it was", name, where))
        return Decision(non_finite(info))
    if attempt.decision.auto_scale and not fits_scale(scheme, attempt.largest_scale):
        wide = with_scale(scheme, "F32")
        text = f"its scales are out of the range of {scheme.scale_dtype}: they are stored in F32"
        warn(Notice("scale_widened", text, name, where))
        return replace(attempt.decision, rule=f"{attempt.decision.rule}; {text}", scheme=wide)
    missed = missed_accuracy(attempt.sums, scheme, config)
    if missed is None:
        return None
    if config.on_failure == "fail":
        raise AccuracyTooLow(
            f"tensor {name}: {missed}; give it more bits with `layers`, lower `min_accuracy`,"
            " or set `on_failure` to `fallback` or `warn`",
            tensor=name,
        )
    if config.on_failure == "warn":
        warn(Notice("accuracy_missed", missed, name, where))
        return None
    wider = wider_scheme(scheme, info, output.format)
    if wider is None or attempt.stored_bytes(info, wider) >= info.nbytes:
        warn(Notice("fallback_copied", f"{missed}: copied as it was", name, where))
        return Decision(f"{missed}: copied")
    warn(Notice("fallback_taken", f"{missed}: {wider.id} instead", name, where))
    return replace(attempt.decision, rule=f"{missed}: {wider.id} instead", scheme=wider)


def missed_accuracy(sums: ErrorSums, scheme: Scheme, config: ResolvedConfig) -> str | None:
    """Why these errors are too large, or None."""
    floor = config.min_accuracy or 0.0
    if sums.accuracy < floor:
        of = " of the output" if sums.has_output else ""
        return f"cosine similarity {sums.accuracy:.4f}{of} with {scheme.id} misses min_accuracy {floor:g}"
    if not sums.keeps_magnitude:
        what, error = ("output", sums.output_relative_error) if sums.has_output else ("weights", sums.relative_error)
        return f"{scheme.id} does not keep the magnitude of the {what} (relative error {error:.3g})"
    return None


def fits_scale(scheme: Scheme, largest: float) -> bool:
    """Whether scales of up to this size are stored with all the digits of their dtype."""
    smallest_normal, limit = SCALE_RANGES[scheme.scale_dtype]
    return smallest_normal <= largest < limit


def wider_scheme(scheme: Scheme, info: TensorInfo, format_: type[Format]) -> Scheme | None:
    """The same granularity at the next width that the format holds, or None behind the last: as integers, with nested
    scales where these were.

    Integers have groups of a row in place of blocks, and scales of the usual dtype in place of small ones.
    """
    parameters = scheme.model_dump(include={"granularity", "group_size", "scale_dtype"})
    if scheme.granularity == "block":
        parameters |= {"granularity": "group", "group_size": BLOCK}
    for bits in FALLBACK_BITS:
        if bits > scheme.bits:
            nested = f"int{bits}_nested"
            id_ = nested if isinstance(scheme, NestedScheme) and nested in schemes() else f"int{bits}"
            if scheme.scale_dtype not in schemes()[id_].choices("scale_dtype"):
                parameters["scale_dtype"] = schemes()[id_].usual_scale(info.dtype)
            wider = build_scheme(id_, symmetric=scheme.symmetric, **parameters)
            if format_.refuses_tensor(info, wider) is None:
                return wider
    return None
