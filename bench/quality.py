"""How much is lost at equal bits: ours by scheme and method beside other quantizers, on the same layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bench.charts import Curve, draw_curves
from bench.common import RESULTS, cores, note, table, write_result
from bench.quality_layers import SUBJECTS, Layer, Subject
from bench.quality_marks import ABOUT_MARKS, CLASSES, Mark, Outcome, best_below, classed, marks, undominated
from bench.quality_ours import THOROUGH, Ours, backend, ours
from bench.quality_peers import Peer, Unfit, peers
from service.engine.backends.output_error import with_output
from service.engine.metrics import ErrorSums

INTRODUCTION = """
Figures are signal over error in dB, of all weights of the layers together and of what the layers put out: more is
better. *Output* is exact, from the Gram matrix of the inputs that calibrated; *unseen* is of other inputs from the same
source. *Bits* of a weight count all that is stored: codes, scales, zero points, what inputs are divided by. *Best* is
what nothing else of its kind exceeds at no more bits: of *data-free* ones by the error of weights, of *calibrated* ones
by that of outputs. Of the methods of a scheme the best of each kind is shown.

ggml's types have blocks of 256, which go on from row to row where a row has no whole ones; its own tool would take
another type there. "Weights of 1" have it search as it does with importances, without any. HQQ and bitsandbytes are the
libraries themselves, NF4 of the latter with its own code for the CPU. GPTQ as published is written after the paper.
llm-compressor and GPTQModel are absent: they do not install beside the versions of torch and transformers here."""
PACKAGES = ("numpy", "torch", "transformers", "hqq", "bitsandbytes", "libggml-python")


def main() -> None:
    """Measure all models, write the page."""
    parts, curves = [INTRODUCTION], []
    held: list[Mark] = []
    for subject in SUBJECTS:
        outcomes = _measure(subject)
        parts += [f"## {subject.title}", subject.about, _methods(outcomes)]
        for low in CLASSES:
            parts += [f"### {subject.title}, {low} bits", _table(classed(outcomes, low), outcomes)]
        held += marks(subject.title, outcomes)
        curves += _curves(subject.title, outcomes)
    head = ["model", "bits", "least error of", "others", "lose less", "verdict", "least lead, dB"]
    parts += [ABOUT_MARKS, table(head, (mark.cells() for mark in held)), "### Where ours loses more, and why"]
    parts += [table(["model", "error of", "the other", "ours", "what the other has"], _misses(held))]
    picture = "quality.png"
    draw_curves(curves, RESULTS / picture)
    write_result("quality", "Quality at equal bits", *parts, f"![Errors over bits]({picture})", packages=PACKAGES)


def _misses(held: Sequence[Mark]) -> Iterator[list[str]]:
    for mark in held:
        yield from mark.misses()


def _measure(subject: Subject) -> list[Outcome]:
    """All candidates that can hold the layers, and whose libraries there are."""
    note(f"{subject.title}: calibrating")
    layers, found = subject.layers(), []
    with ThreadPoolExecutor(cores()) as pool:
        for family, method, is_ours, is_calibrated, candidate in _candidates():
            note(f"{subject.title}: {family} {method}")
            try:
                results = [*pool.map(lambda layer, c=candidate: _loss(layer, c), layers)]
            except Unfit:
                continue
            bits, seen, unseen = zip(*results, strict=True)
            size = sum(layer.weights.size for layer in layers)
            sums = sum(seen, ErrorSums()), sum(unseen, ErrorSums())
            found.append(Outcome(family, method, is_ours, is_calibrated, sum(bits) / size, *sums))
    return found


def _candidates() -> Iterator[tuple[str, str, bool, bool, Ours | Peer]]:
    for name, mine in ours():
        yield name, mine.method.id, True, mine.is_calibrated, mine
    for name, is_calibrated, peer in peers():
        yield name, "", False, is_calibrated, peer


def _loss(layer: Layer, candidate: Ours | Peer) -> tuple[float, ErrorSums, ErrorSums]:
    """The bits that a layer takes, and what is lost by the inputs that calibrated and by others."""
    assert layer.inputs.gram is not None, "every subject has it"
    restored = candidate.restore(layer)
    read = np.ascontiguousarray(restored.weights, np.float32)
    plain = backend().compare(layer.weights, read)
    return restored.bits, *(with_output(plain, layer.weights, read, g) for g in (layer.inputs.gram, layer.unseen))


def _methods(outcomes: Sequence[Outcome]) -> str:
    """By method, weights and outputs, of the schemes that go with all."""
    cells: dict[tuple[str, bool], dict[str, str]] = {}
    for o in outcomes:
        if o.is_ours and o.family in THOROUGH:
            cells.setdefault((o.method, o.is_calibrated), {})[o.family] = f"{o.weight_db:.1f}, {o.output_db:.1f}"
    rows = [
        [f"{method}{', calibrated' * calibrated}", *(found.get(name, "") for name in THOROUGH)]
        for (method, calibrated), found in sorted(cells.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
    return table(["weights, outputs", *THOROUGH], rows)


def _table(some: Sequence[Outcome], outcomes: Sequence[Outcome]) -> str:
    """Of each family the best of each kind, by the error that counts for the kind, the least first."""
    best: dict[tuple[str, bool], Outcome] = {}
    for o in some:
        key = o.family, o.is_calibrated
        if key not in best or o.counts > best[key].counts:
            best[key] = o
    rows = [
        [
            f"**{o.name}**" if o.is_ours else o.name,
            f"{o.bits:.3f}",
            *(f"{value:.2f}" for value in (o.weight_db, o.output_db, o.unseen_db)),
            ("calibrated" if o.is_calibrated else "data-free") if undominated(o, outcomes) else "",
        ]
        for o in sorted(best.values(), key=lambda o: -o.output_db)
    ]
    return table(["", "bits", "weights", "output", "unseen", "best"], rows)


def _curves(title: str, outcomes: Sequence[Outcome]) -> Iterator[list[Curve]]:
    """For a picture each: the least errors of ours over bits, and each of the others."""
    for is_calibrated, what in ((False, "weights, data-free"), (True, "outputs, calibrated")):
        mine = [o for o in outcomes if o.is_ours and o.is_calibrated == is_calibrated]
        best = sorted({o.bits: best_below(mine, o.bits) for o in mine}.items())
        points = [(bits, o.counts) for bits, o in best if o]
        others = [(o.bits, o.counts) for o in outcomes if not o.is_ours and o.is_calibrated == is_calibrated]
        yield [Curve(f"{title}: {what}", "ours, least error", points), Curve("", "others", others, ours=False)]


if __name__ == "__main__":
    main()
