"""What each tensor would lose in each of the schemes that it may choose from: one pass over some rows of each.

Rows are quantized independently of each other, so a sample of them, spread over the tensor, tells of all. What was
measured is kept in a file, so that a run that was stopped does not measure again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import service
from service.engine.backends.base import Backend, Grid
from service.engine.equalise import TRIAL_ROWS, Stretch
from service.engine.formats.base import ModelReader
from service.engine.inputs import LayerInputs
from service.engine.low_rank import LowRank, find_down
from service.engine.methods.base import Method
from service.engine.metrics import ErrorSums
from service.engine.plan import Decision, Plan, choices
from service.engine.progress import Cancelled, Happening, Progress, Report
from service.engine.publish import stop_when
from service.engine.sampling import spread
from service.engine.schemes.base import Scheme
from service.engine.tensors import Array, QuantizedRows, TensorInfo

#: Its name in the work folder.
MEASURED = "sensitivity.jsonl"
#: Elements of a tensor that are looked at; one that has fewer is looked at whole.
SAMPLE_ELEMENTS = 1 << 20
#: Share of a run's fraction that measuring takes.
MEASURING_SHARE = 0.15

Way = tuple[Scheme, Method]
#: Of each tensor, by the key of a way, what is lost in it.
Sensitivities = Mapping[str, Mapping[str, ErrorSums]]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A tensor and the ways that are to be measured."""

    info: TensorInfo
    ways: tuple[Way, ...]
    is_fed: bool


def way_key(decision: Decision) -> str:
    """By what a decision to quantize is found among those measured."""
    assert decision.way is not None, "a copy loses nothing"
    return _key(decision.way)


def measure(
    plan: Plan, reader: ModelReader, *, backend: Backend, memo: Path | None, report: Report, cancelled: Cancelled
) -> Sensitivities:
    """What the tensors that have a choice lose in each way.

    Goes on with what `memo` holds of the same model and the same ways, and adds to it; None keeps nothing. Raises
    Cancelled, and what reading raises.
    """
    wanted = [each for each in _wanted(plan) if each.ways]
    kept = _Memo(memo, _fingerprint(wanted, plan, reader, backend))
    try:
        for index, each in enumerate(wanted):
            stop_when(cancelled)
            if each.info.name not in kept.found:
                inputs = plan.feed.inputs(each.info) if plan.feed is not None and each.is_fed else None
                kept.add(each.info.name, _measure(each, inputs, reader, backend, cancelled))
            report(_progress(index + 1, wanted))
        return kept.found
    finally:
        kept.close()


def behind_measuring(report: Report) -> Report:
    """`report` for what comes after `measure`: of the fraction it has the rest."""

    def told(happening: Happening) -> None:
        if isinstance(happening, Progress):
            fraction = MEASURING_SHARE + (1 - MEASURING_SHARE) * happening.fraction
            happening = replace(happening, fraction=fraction)
        report(happening)

    return told


def _wanted(plan: Plan) -> Iterable[_Wanted]:
    for tensor in plan.tensors:
        ways: dict[Way, None] = {}
        for output in plan.outputs:
            options = choices(tensor.info, output, tensor.tells)
            if len(options) > 1:
                ways |= dict.fromkeys(option.way for option in options if option.way is not None)
        yield _Wanted(tensor.info, tuple(ways), tensor.is_fed)


def _measure(
    wanted: _Wanted, inputs: LayerInputs | None, reader: ModelReader, backend: Backend, cancelled: Cancelled
) -> dict[str, ErrorSums]:
    x = _sample(wanted.info, reader)
    ranks = {method.low_rank for _, method in wanted.ways} - {0}
    low_ranks = {rank: _low_rank(rank, wanted.info, inputs, reader, cancelled) for rank in ranks}
    found: dict[str, ErrorSums] = {}
    for scheme, method in wanted.ways:
        stop_when(cancelled)
        found[_key((scheme, method))] = _quantized(
            x, scheme, method, inputs, backend, low_ranks.get(method.low_rank)
        ).errors
        backend.take_notices()  # the run itself tells what it lacks
    return found


def _quantized(
    x: Array,
    scheme: Scheme,
    method: Method,
    inputs: LayerInputs | None,
    backend: Backend,
    low_rank: LowRank | None = None,
) -> QuantizedRows:
    if low_rank is not None:
        trial = np.concatenate([x[slice(*span)] for span in spread(len(x), TRIAL_ROWS)])
        if low_rank.gains(trial, scheme, method.quantizes_as, backend):
            grid = _grid(low_rank.apply(x), scheme, method.quantizes_as, backend)
            return low_rank.quantize(x, scheme, method.quantizes_as, grid, backend)
    if method.scales_inputs and inputs is not None:
        trial = np.concatenate([x[slice(*span)] for span in spread(len(x), TRIAL_ROWS)])
        if (stretch := Stretch.of(trial, scheme, inputs, backend)) is not None:
            grid = _grid(stretch.apply(x), scheme, method.quantizes_as, backend)
            return stretch.quantize(x, scheme, method.quantizes_as, grid, backend)
    method = method.quantizes_as
    return backend.quantize(x, scheme, method, _grid(x, scheme, method, backend), inputs)


def _low_rank(
    rank: int, info: TensorInfo, inputs: LayerInputs | None, reader: ModelReader, cancelled: Cancelled
) -> LowRank | None:
    """Of the whole tensor: a few of its rows would be followed too closely."""
    step = max(1, SAMPLE_ELEMENTS // max(1, info.cols))

    def blocks() -> Iterator[Array]:
        for start in range(0, info.rows, step):
            stop_when(cancelled)
            yield reader.rows(info, start, min(start + step, info.rows))

    down = find_down(blocks, info.rows, info.cols, rank, inputs)
    return None if down is None else LowRank.of(down, inputs)


def _grid(x: Array, scheme: Scheme, method: Method, backend: Backend) -> Grid | None:
    if not scheme.takes_pass:
        return None
    seen = backend.observe(x)
    return backend.tensor_grid(seen, scheme, method) if seen.finite else Grid(np.float32(1), np.float32(0))


def _sample(info: TensorInfo, reader: ModelReader) -> Array:
    """Some rows of the tensor, (rows, cols), in its dtype: all of them, or pieces at equal distances."""
    rows = max(1, SAMPLE_ELEMENTS // max(1, info.cols))
    return np.concatenate([reader.rows(info, *span) for span in spread(info.rows, rows)])


def _key(way: Way) -> str:
    scheme, method = way
    return json.dumps([scheme.id, scheme.model_dump(mode="json"), method.id, method.model_dump(mode="json")])


def _progress(done: int, wanted: Sequence[_Wanted]) -> Progress:
    return Progress(
        fraction=max(1e-4, MEASURING_SHARE * done / len(wanted)),
        stage="measuring",
        tensors_done=done,
        tensors_total=len(wanted),
        bytes_done=sum(each.info.nbytes for each in wanted[:done]),
        bytes_total=sum(each.info.nbytes for each in wanted),
        bytes_per_s=0.0,
        eta_s=None,
    )


def _fingerprint(wanted: Sequence[_Wanted], plan: Plan, reader: ModelReader, backend: Backend) -> str:
    parts: list[Any] = [service.__version__, backend.id, reader.layout.fingerprint, reader.identity()]
    parts += [plan.feed.identity if plan.feed is not None else None]
    parts += [[each.info.name, [_key(way) for way in each.ways]] for each in wanted]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _Memo:
    """What was measured, a line for each tensor under one that says of what; a line cut off by a crash is left out."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.found: dict[str, dict[str, ErrorSums]] = {}
        header = (json.dumps({"measured": fingerprint}) + "\n").encode()
        self._file = None
        if path is None:
            return
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = header if lines[:1] == [header] else b""
        for line in lines[1:] if kept else ():
            if not self._take(line):
                break
            kept += line
        self._file = path.open("wb")
        self._file.write(kept or header)
        self._file.flush()

    def add(self, name: str, errors: dict[str, ErrorSums]) -> None:
        """Note a tensor."""
        self.found[name] = errors
        if self._file is not None:
            sums = {key: [getattr(e, f) for f in ErrorSums.__dataclass_fields__] for key, e in errors.items()}
            self._file.write((json.dumps([name, sums]) + "\n").encode())
            self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def _take(self, line: bytes) -> bool:
        try:
            name, sums = json.loads(line)
            self.found[name] = {key: ErrorSums(*values) for key, values in sums.items()}
        except (ValueError, TypeError, AttributeError):
            return False
        return line.endswith(b"\n")
