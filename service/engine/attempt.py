"""One way in which a tensor is tried, for all outputs that want it so, and what is stored beside its codes then."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.activation_groups import ActivationGrids
from service.engine.backends.base import Grid
from service.engine.beside import Beside
from service.engine.equalise import Stretch
from service.engine.low_rank import LowRank
from service.engine.metrics import ErrorSums
from service.engine.plan import Decision
from service.engine.schemes.base import Scheme
from service.engine.tensors import FloatArray, TensorInfo, low_rank_bytes


@dataclass(slots=True)
class Attempt:
    """One way to store the tensor, for all outputs that want it so."""

    decision: Decision
    outputs: list[int]
    sums: ErrorSums = field(default_factory=ErrorSums)
    largest_scale: float = 0.0
    grid: Grid | None = None
    made: Stretch | LowRank | None = None  # what is done to the weights before
    grids: dict[int, ActivationGrids] = field(default_factory=dict)  # by output

    @property
    def input_scale(self) -> FloatArray | None:
        """What the layer's inputs are divided by, if they are."""
        return self.made.scale if isinstance(self.made, Stretch) else None

    def beside(self, output: int) -> Beside | None:
        """What an output stores beside the codes."""
        grids = self.grids.get(output)
        if grids is None and self.made is None:
            return None
        return Beside(
            input_scale=self.input_scale,
            time_group_bounds=grids.bounds if grids else None,
            activation_scale=grids.scale if grids else None,
            activation_zero_point=grids.zero_point if grids else None,
            low_rank_down=self.made.down if isinstance(self.made, LowRank) else None,
        )

    def stored_bytes(self, info: TensorInfo, scheme: Scheme) -> int:
        """What the tensor takes in this scheme with all that is beside its codes."""
        if isinstance(self.made, LowRank):
            return scheme.stored_bytes(info.rows, info.cols) + low_rank_bytes(info.rows, info.cols, len(self.made.down))
        return scheme.stored_bytes(info.rows, info.cols) + (0 if self.made is None else self.made.scale.nbytes)


def grouped(decisions: dict[int, Decision]) -> list[Attempt]:
    """Outputs that store the tensor in the same way share the work."""
    attempts: dict[tuple[object, object], Attempt] = {}
    for output, decision in sorted(decisions.items()):
        key = (decision.scheme, decision.method)
        attempts.setdefault(key, Attempt(decision, [])).outputs.append(output)
    return list(attempts.values())
