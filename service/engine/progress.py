"""What a running engine reports upwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from service.engine.records import record

Stage = Literal["planning", "measuring", "quantizing", "validating", "writing", "hashing"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come. `fraction` lies strictly between 0 and 1 and never falls."""

    fraction: float
    stage: Stage
    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int
    bytes_per_s: float
    eta_s: float | None


@record(frozen=True, slots=True)
class TensorCompleted:
    """One tensor is finished in one output. A copy has the scheme `none` and no errors."""

    output: str
    name: str
    shape: tuple[int, ...]
    scheme: str
    bits: float
    cosine_similarity: float | None
    sqnr_db: float | None
    bytes_in: int
    bytes_out: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a user should know: a fallback taken, a tensor copied although it was to be quantized."""

    code: str
    text: str
    tensor: str | None = None
    output: str | None = None

    @property
    def sentence(self) -> str:
        """The text, and before it what it is about: `tensor in output: text`."""
        about = " in ".join(filter(None, (self.tensor, self.output)))
        return f"{about}: {self.text}" if about else self.text


Happening = Progress | TensorCompleted | Notice
Report = Callable[[Happening], None]
Cancelled = Callable[[], bool]
