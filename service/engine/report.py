"""What a run measured: per tensor, per output, and as the few figures a user looks at first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, astuple, dataclass, field, fields, replace
from math import prod
from operator import attrgetter
from pathlib import PurePosixPath
from typing import Any, Self

import pyarrow as pa

from service.engine.activation_groups import TimeGroupFigures
from service.engine.formats.base import FileEntry
from service.engine.metrics import ErrorSums, OutputQuality, Quality
from service.engine.progress import TensorCompleted
from service.engine.records import record
from service.errors import NotFound

WORST = 10
#: Warnings shown with a job; a model of many tensors can have thousands, which the report keeps.
WARNINGS_SHOWN = 20


@record(frozen=True, slots=True)
class TensorReport:
    """One tensor in one output. Copies have the scheme `none` and no errors."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scheme: str
    rule: str
    original_bytes: int
    stored_bytes: int
    seconds: float
    method: str | None = None
    bits: int | None = None
    symmetric: bool | None = None
    granularity: str | None = None
    group_size: int | None = None
    scale_dtype: str | None = None
    sums: ErrorSums | None = None
    time_groups: TimeGroupFigures | None = None

    @property
    def quality(self) -> Quality | None:
        """The figures that follow from the sums."""
        return Quality.of(self.sums, self.stored_bytes) if self.sums else None

    def completed(self, output: str) -> TensorCompleted:
        """What is told of it when it is finished in this output."""
        sums = self.sums
        return TensorCompleted(
            output=output,
            name=self.name,
            shape=self.shape,
            scheme=self.scheme,
            bits=8.0 * self.stored_bytes / max(1, prod(self.shape)),
            cosine_similarity=sums.cosine_similarity if sums else None,
            sqnr_db=sums.sqnr_db if sums else None,
            bytes_in=self.original_bytes,
            bytes_out=self.stored_bytes,
            seconds=self.seconds,
        )

    def row(self) -> dict[str, Any]:
        """As a flat row, sums replaced by the figures."""
        quality = self.quality
        output = OutputQuality.of(self.sums) if self.sums else None
        figures = _fields(quality) if quality else dict.fromkeys(Quality.__dataclass_fields__)
        figures |= _fields(output) if output else dict.fromkeys(OutputQuality.__dataclass_fields__)
        fields = {k: getattr(self, k) for k in self.__dataclass_fields__ if k != "sums"}
        groups = asdict(self.time_groups) if self.time_groups else None
        return fields | {"shape": list(self.shape), "time_groups": groups} | figures


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """The least error at one size of an output.

    bits_per_weight  of its quantized weights, everything counted
    size_bytes       of all its tensors, copied ones too
    relative_error   root of the mean of the squared relative errors of its quantized tensors
    schemes          how many tensors have which scheme
    """

    bits_per_weight: float
    size_bytes: int
    relative_error: float
    schemes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Budget:
    """What was chosen for an output under its target, and what else there was to choose.

    `is_exact` tells that no choice of the candidates has a smaller error within the target; `curve` goes from the
    smallest size to the largest.
    """

    chosen: BudgetPoint
    is_exact: bool
    curve: tuple[BudgetPoint, ...]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        return cls(
            BudgetPoint(**data["chosen"]), data["is_exact"], tuple(BudgetPoint(**point) for point in data["curve"])
        )


@dataclass(frozen=True, slots=True)
class OutputReport:
    """All tensors of one output, and the files that hold them."""

    name: str
    format: str
    bit_width: int | None
    min_accuracy: float
    tensors: tuple[TensorReport, ...]
    original_bytes: int
    files: tuple[FileEntry, ...] = ()
    budget: Budget | None = None

    @property
    def sums(self) -> ErrorSums:
        """Over all quantized weights together."""
        return sum((t.sums for t in self.tensors if t.sums), ErrorSums())

    @property
    def quality(self) -> Quality:
        """Over all quantized weights together: not a mean of means."""
        return Quality.of(self.sums, sum(t.stored_bytes for t in self.tensors if t.sums))

    @property
    def quantized_bytes(self) -> int:
        """Bytes of the weights as stored; of the files where there are any."""
        return sum(f.size_bytes for f in self.files) or sum(t.stored_bytes for t in self.tensors)

    @property
    def worst(self) -> list[TensorReport]:
        """The tensors with the lowest cosine similarity, of the output where that is known."""
        measured = [(t.sums.accuracy, t) for t in self.tensors if t.sums]
        return [t for _, t in sorted(measured, key=lambda pair: pair[0])[:WORST]]

    @property
    def passed(self) -> bool:
        """Whether the whole and each tensor reach `min_accuracy`, and are about as large as they were.

        A whole are those whose outputs are known, and those of which only the weights are.
        """
        measured = [t.sums for t in self.tensors if t.sums]
        parts = ([s for s in measured if s.has_output], [s for s in measured if not s.has_output])
        wholes = [sum(part, ErrorSums()) for part in parts if part]
        return all(sums.accuracy >= self.min_accuracy and sums.keeps_magnitude for sums in (*measured, *wholes))

    def summary(self) -> dict[str, Any]:
        """The figures of the output as a whole."""
        quantized = self.quantized_bytes
        counted = sum(t.original_bytes for t in self.tensors if t.sums)
        stored = sum(t.stored_bytes for t in self.tensors if t.sums)
        output = OutputQuality.of(self.sums)
        return (
            asdict(self.quality)
            | (asdict(output) if output else {})
            | {
                "name": self.name,
                "format": self.format,
                "bit_width": self.bit_width,
                "original_bytes": self.original_bytes,
                "quantized_bytes": quantized,
                "compression_ratio": self.original_bytes / quantized if quantized else 1.0,
                "weights_compression_ratio": counted / stored if stored else 1.0,
                "tensors_quantized": sum(t.sums is not None for t in self.tensors),
                "tensors_total": len(self.tensors),
                "passed": self.passed,
            }
        )

    def to_json(self) -> dict[str, Any]:
        """All of it, names of files and the worst tensors included."""
        fields = self.summary() | {
            "min_accuracy": self.min_accuracy,
            "worst_tensors": [t.name for t in self.worst],
            "tensors": [_drop_none(t.row()) | {"sums": _sums(t.sums) if t.sums else None} for t in self.tensors],
            "files": [asdict(f) | {"path": str(f.path)} for f in self.files],
        }
        return fields if self.budget is None else fields | {"budget": asdict(self.budget)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> OutputReport:
        """The inverse of `to_json`."""
        return cls(
            name=data["name"],
            format=data["format"],
            bit_width=data["bit_width"],
            min_accuracy=data["min_accuracy"],
            tensors=tuple(tensor_from_json(t) for t in data["tensors"]),
            original_bytes=data["original_bytes"],
            files=tuple(FileEntry(**(f | {"path": PurePosixPath(f["path"])})) for f in data["files"]),
            budget=Budget.from_json(data["budget"]) if "budget" in data else None,
        )


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run measured."""

    kind: str
    modality: str
    backend: str
    outputs: tuple[OutputReport, ...]
    warnings: tuple[str, ...]
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)
    stage_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every output reaches its `min_accuracy`."""
        return all(output.passed for output in self.outputs)

    def result(self) -> dict[str, Any]:
        """The `result` of a job: the first output's figures on top, then each output's; the first warnings only."""
        summaries = [_drop_none(output.summary()) for output in self.outputs]
        top = {k: v for k, v in summaries[0].items() if k not in ("name", "format")}
        shared = {
            "modality": self.modality,
            "quantization_time_s": self.seconds,
            "backend": self.backend,
            "passed": self.passed,
            "warnings": list(self.warnings[:WARNINGS_SHOWN]),
            "warnings_total": len(self.warnings),
        }
        return top | shared | {"outputs": summaries}

    def to_json(self) -> dict[str, Any]:
        """As JSON, everything in it."""
        return {
            "kind": self.kind,
            "modality": self.modality,
            "backend": self.backend,
            "passed": self.passed,
            "quantization_time_s": self.seconds,
            "stages": self.stages,
            "stage_bytes": self.stage_bytes,
            "warnings": list(self.warnings),
            "outputs": [output.to_json() for output in self.outputs],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunReport:
        """The inverse of `to_json`."""
        return cls(
            kind=data["kind"],
            modality=data["modality"],
            backend=data["backend"],
            outputs=tuple(OutputReport.from_json(o) for o in data["outputs"]),
            warnings=tuple(data["warnings"]),
            seconds=data["quantization_time_s"],
            stages=data["stages"],
            stage_bytes=data.get("stage_bytes", {}),
        )

    def table(self, output: str | None = None) -> pa.Table:
        """The per-tensor table of one output, by default of all; raises NotFound."""
        chosen = [o for o in self.outputs if output in (None, o.name)]
        if not chosen:
            names = ", ".join(o.name for o in self.outputs)
            raise NotFound(f"there is no output {output!r} in this report; there are {names}")
        rows = [{"output": o.name} | t.row() for o in chosen for t in o.tensors]
        return pa.Table.from_pylist(rows, schema=TABLE_SCHEMA)


TABLE_SCHEMA = pa.schema(
    [
        ("output", pa.string()),
        ("name", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("dtype", pa.string()),
        ("scheme", pa.string()),
        ("bits", pa.int8()),
        ("symmetric", pa.bool_()),
        ("granularity", pa.string()),
        ("group_size", pa.int32()),
        ("scale_dtype", pa.string()),
        ("method", pa.string()),
        ("rule", pa.string()),
        ("original_bytes", pa.int64()),
        ("stored_bytes", pa.int64()),
        ("bits_per_weight", pa.float64()),
        ("cosine_similarity", pa.float64()),
        ("sqnr_db", pa.float64()),
        ("relative_error", pa.float64()),
        ("max_abs_error", pa.float64()),
        ("output_cosine_similarity", pa.float64()),
        ("output_sqnr_db", pa.float64()),
        ("output_relative_error", pa.float64()),
        ("seconds", pa.float64()),
    ]
)


def tensor_to_row(report: TensorReport) -> Sequence[Any]:
    """For a checkpoint: the values of all fields in their order, for a copy without those that need not be given."""
    if report.sums is None:
        return _given(report)
    measured = (*_values(report), _sum_values(report.sums))
    return measured if report.time_groups is None else (*measured, astuple(report.time_groups))


def tensor_from_row(row: Sequence[Any]) -> TensorReport:
    """The inverse of `tensor_to_row`; raises TypeError or ValueError when it is nothing such."""
    if not isinstance(row, list):
        raise TypeError(f"{row!r:.80} is no list")
    names = _FIELDS[:_GIVEN] if len(row) == _GIVEN else [*_FIELDS, *_MEASURED][: max(len(row), _LEAST_MEASURED)]
    values = dict(zip(names, row, strict=True))
    values["shape"] = tuple(values["shape"])
    if "sums" in values:
        values["sums"] = ErrorSums(*values["sums"])
    if "time_groups" in values:
        values["time_groups"] = TimeGroupFigures(*values["time_groups"])
    return TensorReport(**values)


def tensor_from_json(data: dict[str, Any]) -> TensorReport:
    """A tensor of `OutputReport.to_json`, in which are also figures that follow from the sums."""
    fields = {k: v for k, v in data.items() if k in TensorReport.__dataclass_fields__}
    sums, groups = fields.pop("sums", None), fields.pop("time_groups", None)
    report = TensorReport(**(fields | {"shape": tuple(fields["shape"])}))
    report = replace(report, time_groups=TimeGroupFigures(**groups)) if groups else report
    return replace(report, sums=ErrorSums(**sums)) if sums else report


def _sums(sums: ErrorSums) -> dict[str, Any]:
    """Those of outputs only where outputs were compared."""
    names = _SUMS if sums.has_output else _WEIGHT_SUMS
    return {name: getattr(sums, name) for name in names}


def _fields(value: TensorReport | Quality | OutputQuality | ErrorSums) -> dict[str, Any]:
    """`asdict` copies deeply; this does not, for it is done for every tensor."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


_SUMS = tuple(f.name for f in fields(ErrorSums))
_WEIGHT_SUMS = tuple(name for name in _SUMS if not name.startswith("out_"))
_MEASURED = ("sums", "time_groups")
_FIELDS = [f.name for f in fields(TensorReport) if f.name not in _MEASURED]
#: Values of what is quantized: time groups it has or not.
_LEAST_MEASURED = len(_FIELDS) + 1
#: How many of a report's fields have to be given.
_GIVEN = sum(f.default is MISSING for f in fields(TensorReport))
_given, _values, _sum_values = attrgetter(*_FIELDS[:_GIVEN]), attrgetter(*_FIELDS), attrgetter(*_SUMS)


def _drop_none(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if v is not None}
