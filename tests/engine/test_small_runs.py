"""Small tensors go together: what comes of them is what comes of each alone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from service.engine import small_runs
from service.engine.backends.cpu import CpuBackend
from service.engine.formats.registry import open_model
from service.engine.progress import Happening, Notice, TensorCompleted
from tests.engine.helpers import files_of, normal, run, save_folder, specs

BOTH = ("compressed-tensors", "parquet")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Copied and quantized ones in turn, of several dtypes, some that need a fallback, and one that is large."""
    tensors: dict[str, np.ndarray] = {}
    for i in range(40):
        tensors[f"b.{i:02d}.q.weight"] = normal(64, 128, seed=i, dtype=ml_dtypes.bfloat16 if i % 5 else np.float32)
        tensors[f"b.{i:02d}.norm.weight"] = normal(100 + i, seed=i)
        tensors[f"b.{i:02d}.odd"] = np.arange(i, dtype=np.uint8)
    for i in range(0, 40, 7):
        tensors[f"b.{i:02d}.q.weight"][:, ::32] *= 200
    tensors["large.weight"] = normal(1024, 256, seed=99)
    return save_folder(tmp_path / "model", tensors)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_together_or_alone_tensors_give_the_same_bytes_and_figures(
    model: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = specs(*BOTH, bit_width=2, min_accuracy=0.97, method=method)
    seen: list[Happening] = []
    together = run(model, tmp_path / "together", outputs, backend=CpuBackend(), happenings=seen)
    monkeypatch.setattr(small_runs, "SMALL_BYTES", 0)
    alone = run(model, tmp_path / "alone", outputs, backend=CpuBackend())
    for folder in ("together", "alone"):
        (tmp_path / folder / "checkpoint.jsonl").unlink()
    assert files_of(tmp_path / "together") == files_of(tmp_path / "alone")
    for one, other in zip(together.outputs, alone.outputs, strict=True):
        assert [t.sums for t in one.tensors] == [t.sums for t in other.tensors]
        assert [(t.name, t.rule, t.scheme) for t in one.tensors] == [(t.name, t.rule, t.scheme) for t in other.tensors]
    assert any("instead" in t.rule for t in together.outputs[0].tensors), "some fell back"
    told = [(h.output, h.name) for h in seen if isinstance(h, TensorCompleted)]
    assert sorted(told) == sorted((o.name, t.name) for o in together.outputs for t in o.tensors)


def test_small_tensors_are_read_and_quantized_together(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    many = CpuBackend.quantize_many
    monkeypatch.setattr(
        CpuBackend, "quantize_many", lambda self, xs, *way: (sizes.append(len(xs)), many(self, xs, *way))[1]
    )
    run(model, tmp_path / "work", specs("compressed-tensors"), backend=CpuBackend())
    assert sum(sizes) == 40
    assert max(sizes) > 20, "the library stores them by dtype, so that those alike follow each other"


@pytest.mark.parametrize("max_shard_bytes", [700, 3000, 40_000])
def test_together_or_alone_copies_lie_in_the_same_files(
    tmp_path: Path, max_shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = int(np.random.default_rng().integers(1 << 32))
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    dtypes = (np.uint8, np.float16, np.float32, np.int64)
    sizes = random.integers(0, 300, 200).tolist()
    tensors = {f"t{i:03d}.weight": np.arange(n).astype(dtypes[random.integers(4)]) for i, n in enumerate(sizes)}
    model = save_folder(tmp_path / "model", tensors)
    outputs = specs(*BOTH[:1], options={"max_shard_bytes": max_shard_bytes})
    run(model, tmp_path / "together", outputs)
    monkeypatch.setattr(small_runs, "SMALL_BYTES", 0)
    run(model, tmp_path / "alone", outputs)
    for folder in ("together", "alone"):
        (tmp_path / folder / "checkpoint.jsonl").unlink()
    assert files_of(tmp_path / "together") == files_of(tmp_path / "alone")
    with closing(open_model(tmp_path / "together" / BOTH[0])) as reader:
        assert len({info.file for info in reader.tensors}) > 1, "in several files"
        found = {info.name: bytes(reader.raw(info, 0, info.nbytes)) for info in reader.tensors}
    assert found == {name: tensor.tobytes() for name, tensor in tensors.items()}


def test_what_one_of_many_needs_is_done_to_that_one_alone(tmp_path: Path) -> None:
    tensors = {f"l.{i:02d}.weight": normal(64, 128, seed=i) for i in range(30)}
    tensors["l.07.weight"][3, 5] = np.nan
    tensors["l.11.weight"] *= np.float32(1e-9)  # too small for scales in F16
    tensors["l.29.weight"][:, 0] *= 30
    source = save_folder(tmp_path / "model", tensors)
    seen: list[Happening] = []
    outputs = specs(*BOTH, bit_width=4, min_accuracy=0.99, on_non_finite="copy")
    report = run(source, tmp_path / "work", outputs, backend=CpuBackend(), happenings=seen)
    for output in report.outputs:
        stored = {t.name: (t.scheme, t.scale_dtype) for t in output.tensors}
        assert list(stored) == sorted(tensors)
        assert stored.pop("l.07.weight") == ("none", None)
        assert stored.pop("l.11.weight") == ("int4", "F32")
        assert stored.pop("l.29.weight")[0] in ("int5", "int6", "int8")
        assert set(stored.values()) == {("int4", "F16")}
    told = {h.tensor: h.code for h in seen if isinstance(h, Notice)}
    assert told == {
        "l.07.weight": "non_finite_copied",
        "l.11.weight": "scale_widened",
        "l.29.weight": "fallback_taken",
    }
