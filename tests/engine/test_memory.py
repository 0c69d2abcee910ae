"""Memory follows the row block: a real run in a process of its own, with one tensor much larger than its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.engine import Job, run_watched
from bench.models import equal, scratch, write_model
from service.engine.formats.parquet_spool import CHUNK_BYTES

BLOCK_BYTES = 16 << 20
TENSOR_BYTES = 512 << 20
#: The block at work and the next one, one of them as float32, what comes of it, and what allocators keep.
BLOCK_BOUND = 6 * BLOCK_BYTES
#: A row of the Parquet file as read from the spool, as Arrow collects it (in a buffer that doubles) and as a page.
ROW_BOUND = 5 * CHUNK_BYTES


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
        pytest.param("parquet", {}, BLOCK_BOUND + ROW_BOUND, id="parquet"),
    ],
)
def test_memory_follows_the_block_and_not_the_tensor(
    model: Path, format_: str, config: dict[str, Any], bound: int
) -> None:
    assert bound < TENSOR_BYTES
    watched = run_watched(Job(model, model.parent / "work", (format_,), block_bytes=BLOCK_BYTES, config=config))
    assert watched.peak.samples > 10
    assert watched.peak.anonymous - watched.baseline_bytes < bound
