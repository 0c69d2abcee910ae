"""Memory follows the row block: a real run in a process of its own, with one tensor much larger than its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bench.engine import Comparison, Job, run_watched
from bench.models import equal, scratch, write_model
from service.engine.formats.registry import open_model
from service.engine.memory_need import need_to_quantize, need_to_validate
from service.engine.plan import make_plan

BLOCK_BYTES = 16 << 20
TENSOR_BYTES = 512 << 20
#: The block at work and the next one, one of them as float32, what comes of it, and what allocators keep.
BLOCK_BOUND = 6 * BLOCK_BYTES
SMALL_GROUPS = {"group_size": 16, "scale_dtype": "F32"}


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    # Not tmp_path: pytest keeps the folders of the last three runs.
    with scratch(2 * TENSOR_BYTES) as folder:
        yield write_model(folder / "model.safetensors", equal(1, (TENSOR_BYTES // 2 // 4096, 4096)), "BF16").path


@pytest.mark.parametrize(
    ("format_", "config", "bound"),
    [
        pytest.param("compressed-tensors", {}, BLOCK_BOUND, id="compressed-tensors"),
        pytest.param("compressed-tensors", {"granularity": "tensor"}, BLOCK_BOUND, id="compressed-tensors, two passes"),
        pytest.param("parquet", {}, BLOCK_BOUND, id="parquet"),
    ],
)
def test_memory_follows_the_block_and_not_the_tensor(
    model: Path, format_: str, config: dict[str, Any], bound: int
) -> None:
    assert bound < TENSOR_BYTES
    job = Job(model, model.parent / "work", (format_,), block_bytes=BLOCK_BYTES, config=config)
    assert peak_of(job) < bound


@pytest.mark.parametrize(
    ("formats", "block_bytes", "config"),
    [
        pytest.param(("compressed-tensors", "parquet"), 16 << 20, {"bit_width": 8}, id="both formats"),
        pytest.param(("parquet",), 16 << 20, SMALL_GROUPS, id="parquet with a scale for sixteen weights"),
    ],
)
def test_what_a_run_holds_is_predicted_and_not_by_far_too_much(
    model: Path, formats: tuple[str, ...], block_bytes: int, config: dict[str, Any]
) -> None:
    job = Job(model, model.parent / "work", formats, block_bytes=block_bytes, config=config)
    with closing(open_model(model)) as reader:
        need = need_to_quantize(make_plan(reader, job.outputs()), block_bytes).nbytes
    check(peak_of(job), need)


def test_what_a_validation_holds_is_predicted_as_well(model: Path) -> None:
    job = Job(model, model.parent / "outputs", ("parquet",))
    run_watched(job)
    with closing(open_model(model)) as original, closing(open_model(job.work / "parquet")) as quantized:
        need = need_to_validate(original, quantized, job.block_bytes).nbytes
    check(peak_of(Comparison(model, job.work / "parquet")), need)


def test_the_reference_backend_holds_no_more() -> None:
    with scratch(TENSOR_BYTES) as folder:
        small = write_model(folder / "model.safetensors", equal(2, (4096, 4096)), "F32").path
        job = Job(small, folder / "work", ("compressed-tensors",), backend="reference", config={"group_size": 32})
        with closing(open_model(small)) as reader:
            need = need_to_quantize(make_plan(reader, job.outputs()), job.block_bytes).nbytes
        check(peak_of(job), need)


def peak_of(job: Job | Comparison) -> int:
    watched = run_watched(job)
    assert watched.peak.samples > 10
    return watched.peak.anonymous - watched.baseline_bytes


def check(peak: int, need: int) -> None:
    print(f"peak {peak >> 20} MiB, predicted {need >> 20} MiB")
    assert peak < need < 3 * peak
