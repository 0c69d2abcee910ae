"""What a plan will cost on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.engine.backends.base import Backend
from service.engine.cost_model import Rates, work_of
from service.engine.memory_need import need_to_quantize
from service.engine.plan import Decision, OutputPlan, Plan, stored_bytes
from service.engine.rates import rates
from service.engine.tensors import TensorInfo
from service.errors import DiskFull, StorageFailure


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of a run that has the machine to itself, and its peak of memory above the idle service."""

    seconds: float
    memory_bytes: int


def estimate(plan: Plan, backend: Backend, block_bytes: int, folder: Path) -> Estimate:
    """Predict a run of this plan; the first call for a scheme, method or format measures them, in `folder`."""
    costs = [_rates(backend, output.format.id, block_bytes, folder) for output in plan.outputs]
    # One run, and one read, for all outputs.
    common = Rates(run_s=max(cost.run_s for cost in costs), read_s=max(cost.read_s for cost in costs))
    seconds = common.seconds(work_of(plan, backend))
    for index, cost in enumerate(costs):
        quantized = plan.quantized(index)
        seconds += (len(plan.tensors) - quantized) * cost.copied_s + quantized * cost.quantized_s
        seconds += plan.predicted_bytes(index) * cost.write_s
    return Estimate(seconds, need_to_quantize(plan, block_bytes).nbytes)


def _rates(backend: Backend, format_id: str, block_bytes: int, folder: Path) -> Rates:
    try:
        return rates(backend, format_id, block_bytes, folder)
    except (DiskFull, StorageFailure):
        return Rates()  # a plan is to be had where no job has room


def describe(plan: Plan, backend: Backend, block_bytes: int, folder: Path) -> dict[str, Any]:
    """The plan and its cost as JSON: each tensor with a decision and the rule behind it for each output.

    What is measured for it is written to `folder`, and removed.
    """
    return {
        "modality": plan.layout.modality,
        "is_diffusion_model": plan.layout.is_diffusion,
        "backend": backend.id,
        "source_bytes": plan.source_bytes,
        "predicted": asdict(estimate(plan, backend, block_bytes, folder)),
        "notes": [*plan.layout.warnings, *(notice.text for notice in plan.warnings), *plan.notes],
        "outputs": [
            {
                "name": output.name,
                "format": output.format.id,
                "predicted_bytes": plan.predicted_bytes(index),
                "config": output.config.model_dump(mode="json", exclude_none=True),
                "tensors": [_row(t.info, t.decisions[index], output) for t in plan.tensors],
            }
            | ({"budget": asdict(budget)} if plan.budgets and (budget := plan.budgets[index]) else {})
            for index, output in enumerate(plan.outputs)
        ],
    }


def _row(info: TensorInfo, decision: Decision, output: OutputPlan) -> dict[str, Any]:
    scheme, method = decision.scheme, decision.method
    row: dict[str, Any] = {
        "name": info.name,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "scheme": scheme.id if scheme else "none",
        "rule": decision.rule,
        "original_bytes": info.nbytes,
        "predicted_bytes": stored_bytes(info, decision, output),
    }
    if scheme and method:
        row |= {"method": method.id, "bit_width": scheme.bits, "granularity": scheme.granularity}
        row |= {"symmetric": scheme.symmetric, "scale_dtype": scheme.scale_dtype}
        row |= {"group_size": scheme.group_size} if scheme.granularity == "group" else {}
        row |= {"time_groups": decision.time_groups} if decision.time_groups else {}
    return row
