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
#: Why ours may lose, by how the other's name begins.
WHY = {
    "ggml IQ2": "codes for 8 weights together, from a table of a lattice: more levels where weights are than any grid "
    "for each weight alone has at so few bits",
    "ggml IQ3": "codes for 4 weights together, from a table of a lattice",
    "ggml IQ4": "16 levels that are not equally spaced, under scales of two levels: ours have one or the other",
    "ggml Q": "super-blocks that go on in the next row where one is short of 256 columns; ours end with "
    "the row, so that those of short rows cost more bits",
    "HQQ": "zero points that are any number, in 16 bits; ours are whole ones in as many bits as a code",
    "bitsandbytes": "scales of 8 bits under others; ours of the same table have 16",
    "GPTQ as published": "grids of the ranges, which fit where the error of rounding is small",
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


def marks(model: str, outcomes: Sequence[Outcome]) -> Iterator[Mark]:
    """For each class of bits and each kind what is held against what."""
    for low in CLASSES:
        for is_calibrated in (False, True):
            kind = [o for o in outcomes if o.is_calibrated == is_calibrated]
            mine = [o for o in kind if o.is_ours]
            pairs = tuple((best_below(mine, o.bits), o) for o in classed(kind, low) if not o.is_ours)
            if pairs:
                yield Mark(model, low, is_calibrated, pairs)


@dataclass(frozen=True, slots=True)
class Mark:
    """Of a class of bits every other quantizer of a kind beside the best of ours that takes no more bits, if any."""

    model: str
    low: int
    is_calibrated: bool
    pairs: tuple[tuple[Outcome | None, Outcome], ...]

    @property
    def what(self) -> str:
        """Whose error of what."""
        return "outputs, calibrated" if self.is_calibrated else "weights, data-free"

    @property
    def missed(self) -> list[tuple[Outcome | None, Outcome]]:
        """The pairs in which the other loses less."""
        return [(our, other) for our, other in self.pairs if our is None or our.counts < other.counts]

    def cells(self) -> list[str]:
        """Model, bits, what; how many others there are, how many lose less; the verdict; the least lead in dB."""
        leads = [our.counts - other.counts for our, other in self.pairs if our is not None]
        least = f"{min(leads):+.2f}" if leads else ""
        verdict = "missed" if self.missed else "met"
        return [self.model, str(self.low), self.what, str(len(self.pairs)), str(len(self.missed)), verdict, least]

    def misses(self) -> Iterator[list[str]]:
        """A row for each pair that was missed: model, what, the other, ours, why."""
        for our, other in self.missed:
            mine = f"{our.name} {our.counts:.2f} at {our.bits:.3f}" if our else "none of so few bits"
            why = next((reason for prefix, reason in WHY.items() if other.family.startswith(prefix)), "")
            yield [self.model, self.what, f"{other.name} {other.counts:.2f} at {other.bits:.3f}", mine, why]
