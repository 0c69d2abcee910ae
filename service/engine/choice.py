"""Which method a tensor gets: the one that was asked for, or the best that its calibration allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from service.engine.config import AUTO
from service.engine.methods.base import Method
from service.engine.methods.registry import methods
from service.errors import InvalidConfig

#: What `auto` takes, and what a method that lacks something gives way to: the first whose needs are met.
BEST_FIRST = ("gptq", "mse")
#: What fields of LayerInputs are called in a sentence.
NAMES = {"gram": "a Gram matrix", "mean_square": "the mean square of its inputs", "absmax": "their largest size"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A method, why it is that one, and what the layer's calibration lacks that was counted on."""

    method: Method
    reason: str | None = None
    missing: str | None = None


@cache
def choose_method(asked: str, tells: frozenset[str] | None, rank: int | None = None) -> Choice:
    """For a layer of which calibration `tells` these fields of LayerInputs; None where the job has no calibration.

    `rank` is that of a low-rank part, where the method has one and something is said of it.

    Raises InvalidConfig when there is none, and the method that was asked for cannot do without.
    """
    if asked == AUTO:
        chosen = _best(BEST_FIRST, tells or frozenset())
        return Choice(chosen, f"auto: {chosen.id}, {_known(chosen, tells)}", _lacking(chosen, tells))
    method = methods()[asked](**({} if rank is None else {"rank": rank}))
    if all(need in (tells or ()) for need in method.needs):
        is_plain = tells is None or not method.is_weighted
        return Choice(method, None if is_plain else f"{asked}, {_known(method, tells)}", _lacking(method, tells))
    if tells is None:
        detail = f"method {asked!r} needs calibration with {_all(method.needs)}: give `calibration`, or choose another"
        raise InvalidConfig(detail, pointer="/config/method")
    other = _best(BEST_FIRST, tells)
    text = (
        f"{asked} needs {_all(method.needs)}, which its calibration lacks: {other.id} instead, {_known(other, tells)}"
    )
    return Choice(other, text, text)


def _best(ids: Sequence[str], tells: frozenset[str]) -> Method:
    known = [methods()[id_] for id_ in ids if id_ in methods()]
    return next(cls() for cls in known if all(need in tells for need in cls.needs))


def _lacking(method: Method, tells: frozenset[str] | None) -> str | None:
    """What is to be told of a layer that the calibration leaves out."""
    if tells is None or "mean_square" in tells or not method.is_weighted:
        return None
    return f"the calibration does not tell {NAMES['mean_square']}: {method.id} without weights"


def _is_weighted(method: Method, tells: frozenset[str] | None) -> bool:
    return method.is_weighted and "mean_square" in (tells or ())


def _known(method: Method, tells: frozenset[str] | None) -> str:
    if method.needs:
        return f"for there is {_all(method.needs)}"
    if _is_weighted(method, tells):
        return f"weighted by {NAMES['mean_square']}"
    return "for there is no calibration of it"


def _all(fields: Sequence[str]) -> str:
    return " and ".join(NAMES[field] for field in fields)
