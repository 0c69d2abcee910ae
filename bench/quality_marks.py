"""Which of ours each other quantizer is held against, and whether ours loses less at no more bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from service.engine.metrics import ErrorSums

#: Whole bits of which tables are made: of what takes so many, and less than one more.
CLASSES = (2, 3, 4, 5, 6, 8)
#: Of bits per weight: what two formats may differ by and still be called equal.
SLACK = 1e-6
ABOUT_MARKS = """
## Marks

Ours has the least error of weights among data-free methods, and the least error of outputs among calibrated ones, at
2, 3, 4 and 8 bits, on every model: each other quantizer beside the best of ours that takes no more bits.
"""
#: By how the other's name begins.
WHY = {
    "bitsandbytes NF4": "its scales take 8 bits; ours of nf4 take 16, and groups of 64 under two levels there are not",
    "ggml IQ": "codes for 4 or 8 weights together, from a table of a lattice: more levels where weights are, at so few "
    "bits, than any grid for each weight alone",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a candidate takes and loses: `seen` with the inputs that calibrated, `unseen` with others."""

    family: str
    method: str
    is_ours: bool
    is_calibrated: bool
    bits: float
    seen: ErrorSums
    unseen: ErrorSums

    @property
    def name(self) -> str:
        """With the method, and whether that is calibrated where this is not plain from it."""
        return " ".join(part for part in (self.family, self.method) if part)

    @property
    def weight_db(self) -> float:
        """Of the weights."""
        return self.seen.sqnr_db or 0.0

    @property
    def output_db(self) -> float:
        """Of the outputs for the inputs that calibrated."""
        return self.seen.output_sqnr_db or 0.0

    @property
    def unseen_db(self) -> float:
        """Of the outputs for others."""
        return self.unseen.output_sqnr_db or 0.0

    @property
    def counts(self) -> float:
        """What its kind is held to: the outputs of calibrated ones, the weights of others."""
        return self.output_db if self.is_calibrated else self.weight_db


def classed(outcomes: Sequence[Outcome], low: int) -> list[Outcome]:
    """Those that take `low` bits and less than one more."""
    return [o for o in outcomes if low <= o.bits < low + 1]


def best_below(some: Sequence[Outcome], bits: float) -> Outcome | None:
    """The one of least error that takes no more bits."""
    return max((o for o in some if o.bits <= bits + SLACK), key=lambda o: o.counts, default=None)


def undominated(one: Outcome, outcomes: Sequence[Outcome]) -> bool:
    """Whether nothing of its kind has less error at no more bits."""
    best = best_below([o for o in outcomes if o.is_calibrated == one.is_calibrated], one.bits)
    return best is not None and one.counts >= best.counts


def marks(outcomes: Sequence[Outcome]) -> Iterator[list[str]]:
    """Rows: bits, by what, the verdict, and the closest call, or all that were missed with the reason."""
    for low in CLASSES:
        for is_calibrated, what in ((False, "weights, data-free"), (True, "outputs, calibrated")):
            kind = [o for o in outcomes if o.is_calibrated == is_calibrated]
            mine = [o for o in kind if o.is_ours]
            pairs = [(best_below(mine, o.bits), o) for o in classed(kind, low) if not o.is_ours]
            if not pairs:
                yield [str(low), what, "no other", ""]
                continue
            missed = [(our, other) for our, other in pairs if our is None or our.counts < other.counts]
            shown = missed or [min(pairs, key=lambda pair: pair[0].counts - pair[1].counts if pair[0] else 0.0)]
            text = "; ".join(_beside(our, other, is_missed=bool(missed)) for our, other in shown)
            yield [str(low), what, "missed" if missed else "met", text]


def _beside(our: Outcome | None, other: Outcome, *, is_missed: bool) -> str:
    theirs = f"{other.name} {other.counts:.2f} at {other.bits:.3f}"
    if our is None:
        return f"none of so few bits, {theirs}"
    why = next((reason for prefix, reason in WHY.items() if other.family.startswith(prefix)), "") if is_missed else ""
    return f"{our.name} {our.counts:.2f} at {our.bits:.3f}, {theirs}{why and f' ({why})'}"
