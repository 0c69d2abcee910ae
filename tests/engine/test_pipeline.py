"""Whole runs of the engine over real files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from service.engine import completion, small_runs
from service.engine.backends.cpu import CpuBackend
from service.engine.backends.reference import ReferenceBackend
from service.engine.formats import compressed_tensors_writer
from service.engine.formats.registry import open_model
from service.engine.formats.trailing_hash import TrailingHash
from service.engine.plan import OutputSpec
from service.engine.progress import Happening, Notice, Progress, TensorCompleted
from service.engine.validation import validate
from service.errors import AccuracyTooLow, Cancelled, NonFiniteWeights
from tests.engine.helpers import files_of, normal, run, save, save_folder, specs

BOTH = ("compressed-tensors", "parquet")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {
        "embed_tokens.weight": normal(64, 128, seed=1),
        "layers.0.q.weight": normal(96, 256, seed=2),
        "layers.0.q.bias": normal(96, seed=3),
        "layers.0.up.weight": normal(300, 96, seed=4, dtype=ml_dtypes.bfloat16),
        "layers.0.norm.weight": normal(256, seed=5, dtype=np.float16),
        "layers.0.down.weight": normal(70, 130, seed=6, dtype=np.float64),
        "steps": np.arange(7),
    }
    return save_folder(tmp_path / "model", tensors)


def test_a_model_becomes_two_outputs_that_read_back_as_measured(model: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "work", specs(*BOTH))
    for output in report.outputs:
        original, stored = open_model(model), open_model(tmp_path / "work" / output.name)
        again = validate(
            original, stored, min_accuracy=0.85, backend=ReferenceBackend(), block_bytes=1 << 16,
            report=lambda _: None, cancelled=lambda: False,
        )  # fmt: skip
        measured = {t.name: t.quality for t in output.tensors if t.sums}
        reread = {t.name: t.quality for t in again.outputs[0].tensors if t.sums}
        assert measured.keys() == reread.keys() == {"layers.0.q.weight", "layers.0.up.weight", "layers.0.down.weight"}
        for name, quality in measured.items():
            assert quality is not None
            assert reread[name].cosine_similarity == pytest.approx(quality.cosine_similarity, abs=1e-9)
            assert reread[name].sqnr_db == pytest.approx(quality.sqnr_db, abs=1e-6)
            assert reread[name].bits_per_weight == pytest.approx(quality.bits_per_weight, abs=0.2)
        assert again.outputs[0].quality.cosine_similarity == pytest.approx(output.quality.cosine_similarity, abs=1e-9)
        assert output.passed
        assert 0.99 < output.quality.cosine_similarity < 1


def test_copies_keep_their_bytes_and_companions_go_along(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "work", specs(*BOTH))
    original = open_model(model)
    for name in BOTH:
        stored = open_model(tmp_path / "work" / name)
        for tensor in ("embed_tokens.weight", "layers.0.q.bias", "layers.0.norm.weight", "steps"):
            before, after = original.find(tensor), stored.find(tensor)
            assert before is not None
            assert after is not None
            assert (before.dtype, before.shape) == (after.dtype, after.shape)
            assert original.raw(before, 0, before.nbytes) == stored.raw(after, 0, after.nbytes)
        assert (tmp_path / "work" / name / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_the_manifest_lists_every_file_with_its_hash(model: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "work", specs(*BOTH))
    for output in report.outputs:
        files = files_of(tmp_path / "work" / output.name)
        listed = json.loads(files.pop("manifest.json"))["files"]
        assert {f["path"]: f["sha256"] for f in listed} == {p: hashlib.sha256(b).hexdigest() for p, b in files.items()}
        assert {str(f.path) for f in output.files} == {*files, "manifest.json"}


@pytest.mark.parametrize("case", ["plain", "several files", "stopped", "fallen back"])
def test_hashes_made_while_the_files_are_written_are_those_of_the_files(
    model: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed_tensors_writer, "FORESEEN_BYTES", 0)  # as with large tensors
    made: list[str] = []
    finish = TrailingHash.finish
    monkeypatch.setattr(TrailingHash, "finish", lambda *args: made.append(finish(*args)) or made[-1])
    fallback = {"bit_width": 2, "min_accuracy": 0.97, "method": "minmax"} if case == "fallen back" else {}
    options = {"max_shard_bytes": 20_000} if case == "several files" else {}
    outputs = specs("compressed-tensors", options=options, **fallback)
    if case == "stopped":
        seen: list[Happening] = []
        with pytest.raises(Cancelled):
            run(model, tmp_path / "work", outputs, happenings=seen, cancelled=lambda: _tensors_done(seen) >= 4)
    report = run(model, tmp_path / "work", outputs)
    listed = {str(file.path): file.sha256 for file in report.outputs[0].files}
    files = files_of(tmp_path / "work" / "compressed-tensors")
    assert listed == {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    weights = {sha256 for path, sha256 in listed.items() if path.endswith(".safetensors")}
    assert set(made) == (set() if case == "fallen back" else weights), "foreseen unless it came otherwise"
    assert len(weights) == 1 or case == "several files"


@pytest.mark.parametrize("min_accuracy", [0.0, 0.97])
def test_a_tensor_of_many_blocks_is_hashed_while_it_is_written(
    tmp_path: Path, min_accuracy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind: list[int] = []
    finish = TrailingHash.finish
    monkeypatch.setattr(
        TrailingHash, "finish", lambda self, end, advance: behind.append(self._position) or finish(self, end, advance)
    )
    tensors = {f"{name}.weight": normal(2048, 1024, seed=i) for i, name in enumerate("abc")}
    source = save(tmp_path / "m.safetensors", tensors)
    outputs = specs("compressed-tensors", bit_width=2, min_accuracy=min_accuracy, symmetric=False)
    report = run(source, tmp_path / "work", outputs, block_bytes=1 << 20, backend=CpuBackend())
    files = files_of(tmp_path / "work" / "compressed-tensors")
    listed = {str(file.path): file.sha256 for file in report.outputs[0].files}
    assert listed == {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    assert len(behind) == (0 if min_accuracy else 1), "a fallback is hashed when it is whole"


def test_two_runs_write_the_same_bytes_whatever_the_threads_of_time(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "one", specs(*BOTH))
    run(model, tmp_path / "two", specs(*BOTH))
    (tmp_path / "one" / "checkpoint.jsonl").unlink()
    (tmp_path / "two" / "checkpoint.jsonl").unlink()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_small_blocks_change_nothing(model: Path, tmp_path: Path, granularity: str, method: str) -> None:
    outputs = specs(*BOTH, granularity=granularity, method=method, on_failure="warn")
    whole = run(model, tmp_path / "whole", outputs, block_bytes=1 << 30)
    blocks = run(model, tmp_path / "blocks", outputs, block_bytes=1)
    for a, b in zip(whole.outputs, blocks.outputs, strict=True):
        assert a.quality.cosine_similarity == pytest.approx(b.quality.cosine_similarity, abs=1e-12)
    name = "compressed-tensors/model.safetensors"
    if method == "minmax":
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "blocks" / name).read_bytes()


def test_each_output_may_have_its_own_configuration(model: Path, tmp_path: Path) -> None:
    [eight] = specs("parquet", bit_width=8)
    [two] = specs("compressed-tensors", bit_width=2, on_failure="warn")
    outputs = [OutputSpec("eight", eight.format, eight.config), OutputSpec("two", two.format, two.config)]
    report = run(model, tmp_path / "work", outputs)
    assert [o.bit_width for o in report.outputs] == [8, 2]
    assert report.outputs[0].quality.cosine_similarity > report.outputs[1].quality.cosine_similarity


@pytest.mark.parametrize("stop_after", range(8))
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(model: Path, tmp_path: Path, stop_after: int) -> None:
    run(model, tmp_path / "undisturbed", specs(*BOTH))
    seen: list[Happening] = []

    outputs = specs(*BOTH)
    with pytest.raises(Cancelled):
        run(model, tmp_path / "work", outputs, happenings=seen, cancelled=lambda: _tensors_done(seen) >= stop_after)
    for spooled in (tmp_path / "work").glob("*/*"):
        if spooled.is_file() and spooled.suffix not in (".json",):
            with spooled.open("ab") as file:
                file.write(b"written after the last checkpoint")
    again: list[Happening] = []
    run(model, tmp_path / "work", specs(*BOTH), happenings=again)
    told = [{h.name for h in happenings if isinstance(h, TensorCompleted)} for happenings in (seen, again)]
    assert len(told[0]) == _tensors_done(seen), "what is done is told, and in the journal, before the run ends"
    assert len(told[1]) == 7 - _tensors_done(seen)
    for folder in ("undisturbed", "work"):
        (tmp_path / folder / "checkpoint.jsonl").unlink()
    assert files_of(tmp_path / "undisturbed") == files_of(tmp_path / "work")


@pytest.mark.parametrize("lines", range(6))
def test_a_run_goes_on_behind_whatever_line_a_crash_has_left(
    model: Path, tmp_path: Path, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, "GROUP_S", 0.0)  # a line for each tensor
    monkeypatch.setattr(small_runs, "MOST", 1)
    run(model, tmp_path / "undisturbed", specs(*BOTH))
    seen: list[Happening] = []
    with pytest.raises(Cancelled):  # when all tensors are done
        run(model, tmp_path / "work", specs(*BOTH), happenings=seen, cancelled=lambda: _tensors_done(seen) == 7)
    journal = tmp_path / "work" / "checkpoint.jsonl"
    header, *entries = journal.read_bytes().splitlines(keepends=True)
    assert len(entries) == 7
    journal.write_bytes(header + b"".join(entries[:lines]) + b'{"reports": [')
    again: list[Happening] = []
    run(model, tmp_path / "work", specs(*BOTH), happenings=again)
    assert len({h.name for h in again if isinstance(h, TensorCompleted)}) == 7 - lines
    for folder in ("undisturbed", "work"):
        (tmp_path / folder / "checkpoint.jsonl").unlink()
    assert files_of(tmp_path / "undisturbed") == files_of(tmp_path / "work")


def _tensors_done(happenings: list[Happening]) -> int:
    return max((h.tensors_done for h in happenings if isinstance(h, Progress)), default=0)


def test_a_journal_of_another_configuration_is_not_gone_on_from(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "fresh", specs(*BOTH, bit_width=8))
    run(model, tmp_path / "work", specs(*BOTH, bit_width=3))
    run(model, tmp_path / "work", specs(*BOTH, bit_width=8))
    for folder in ("fresh", "work"):
        (tmp_path / folder / "checkpoint.jsonl").unlink()
    assert files_of(tmp_path / "fresh") == files_of(tmp_path / "work")


@pytest.mark.parametrize("stop_after", range(0, 60, 3))
def test_a_run_stopped_while_it_finishes_the_files_goes_on_as_well(
    model: Path, tmp_path: Path, stop_after: int
) -> None:
    run(model, tmp_path / "undisturbed", specs(*BOTH))
    seen: list[Happening] = []

    def stop() -> bool:
        return sum(isinstance(h, Progress) and h.stage in ("writing", "hashing") for h in seen) > stop_after

    try:
        run(model, tmp_path / "work", specs(*BOTH), happenings=seen, cancelled=stop)
    except Cancelled:
        run(model, tmp_path / "work", specs(*BOTH))
    for folder in ("undisturbed", "work"):
        (tmp_path / folder / "checkpoint.jsonl").unlink()
    assert files_of(tmp_path / "undisturbed") == files_of(tmp_path / "work")


def _spiky(rows: int, cols: int) -> np.ndarray:
    """A tensor that two bits cannot hold: a few large values in every group."""
    x = normal(rows, cols, seed=9)
    x[:, ::32] *= 200
    return x


def test_a_fallback_climbs_until_the_accuracy_is_reached(tmp_path: Path) -> None:
    save(tmp_path / "m.safetensors", {"a.weight": normal(64, 128), "b.weight": normal(64, 128, seed=1)})
    seen: list[Happening] = []
    outputs = specs("parquet", bit_width=2, min_accuracy=0.97, method="minmax")
    report = run(tmp_path / "m.safetensors", tmp_path / "work", outputs, happenings=seen)
    assert [t.scheme for t in report.outputs[0].tensors] == ["int3", "int3"]
    assert [n.code for n in seen if isinstance(n, Notice)] == ["fallback_taken"] * 2
    assert report.passed
    stored = open_model(tmp_path / "work" / "parquet")
    assert {t.stored_as for t in stored.tensors} == {"int3"}


def test_what_eight_bits_cannot_hold_is_copied(tmp_path: Path) -> None:
    save(tmp_path / "m.safetensors", {"a.weight": _spiky(64, 128), "b.weight": normal(64, 128)})
    seen: list[Happening] = []
    outputs = specs(*BOTH, bit_width=6, min_accuracy=0.9999999)
    report = run(tmp_path / "m.safetensors", tmp_path / "work", outputs, happenings=seen)
    for output in report.outputs:
        assert [t.scheme for t in output.tensors] == ["none", "none"]
    assert [n.code for n in seen if isinstance(n, Notice)].count("fallback_copied") == 4


def test_fail_names_the_tensor(tmp_path: Path) -> None:
    save(tmp_path / "m.safetensors", {"good.weight": normal(64, 128), "bad.weight": _spiky(64, 128)})
    outputs = specs("parquet", bit_width=2, min_accuracy=0.99, on_failure="fail", skip=["good*"])
    with pytest.raises(AccuracyTooLow, match=r"bad\.weight") as caught:
        run(tmp_path / "m.safetensors", tmp_path / "work", outputs)
    assert caught.value.tensor == "bad.weight"


def test_warn_only_tells(tmp_path: Path) -> None:
    save(tmp_path / "m.safetensors", {"a.weight": normal(64, 128)})
    seen: list[Happening] = []
    outputs = specs("parquet", bit_width=2, min_accuracy=0.999, on_failure="warn")
    report = run(tmp_path / "m.safetensors", tmp_path / "work", outputs, happenings=seen)
    assert report.outputs[0].tensors[0].scheme == "int2"
    assert not report.passed
    assert [n.code for n in seen if isinstance(n, Notice)] == ["accuracy_missed"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_a_value_that_is_not_finite_fails_the_run_with_the_tensors_name(
    tmp_path: Path, value: float, granularity: str
) -> None:
    x = normal(64, 128)
    x[40, 7] = value
    save(tmp_path / "m.safetensors", {"fine.weight": normal(64, 128), "sick.weight": x})
    with pytest.raises(NonFiniteWeights, match=r"sick\.weight"):
        run(tmp_path / "m.safetensors", tmp_path / "work", specs("parquet", granularity=granularity))


def test_a_value_that_is_not_finite_can_be_copied(tmp_path: Path) -> None:
    x = normal(64, 128)
    x[40, 7] = np.nan
    save(tmp_path / "m.safetensors", {"sick.weight": x})
    report = run(tmp_path / "m.safetensors", tmp_path / "work", specs(*BOTH, on_non_finite="copy"), block_bytes=1)
    stored = open_model(tmp_path / "work" / "compressed-tensors")
    info = stored.find("sick.weight")
    assert info is not None
    assert bytes(stored.raw(info, 0, info.nbytes)) == x.tobytes()
    assert report.warnings


def test_progress_lies_between_zero_and_one_and_never_falls(model: Path, tmp_path: Path) -> None:
    seen: list[Happening] = []
    run(model, tmp_path / "work", specs(*BOTH, bit_width=2, min_accuracy=0.99), happenings=seen, block_bytes=1)
    fractions = [h.fraction for h in seen if isinstance(h, Progress)]
    assert len(fractions) > 10
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < fractions[-1] < 1
    done = [h.bytes_done for h in seen if isinstance(h, Progress)]
    assert done == sorted(done)


def test_cancelling_between_any_two_blocks_stops_the_run(model: Path, tmp_path: Path) -> None:
    calls = 0

    def count() -> bool:
        nonlocal calls
        calls += 1
        return False

    run(model, tmp_path / "all", specs(*BOTH), block_bytes=1, cancelled=count)
    for stop_at in range(0, calls, max(1, calls // 6)):
        left = iter([False] * stop_at)
        with pytest.raises(Cancelled):
            run(
                model,
                tmp_path / f"work{stop_at}",
                specs(*BOTH),
                block_bytes=1,
                cancelled=lambda left=left: next(left, True),
            )


@pytest.mark.parametrize("magnitude", [1e-8, 1e-5, 1e8, 1e9, 1e30])
def test_scales_out_of_the_range_of_float16_are_stored_in_float32(tmp_path: Path, magnitude: float) -> None:
    ordinary, extreme = normal(64, 128), normal(64, 128) * np.float32(magnitude)
    save(tmp_path / "m.safetensors", {"ordinary.weight": ordinary, "extreme.weight": extreme})
    for backend in (ReferenceBackend(), CpuBackend()):
        work = tmp_path / backend.id
        report = run(tmp_path / "m.safetensors", work, specs(*BOTH, method="mse"), backend=backend)
        for output in report.outputs:
            tensors = {t.name: t for t in output.tensors}
            assert tensors["ordinary.weight"].scale_dtype == "F16"
            assert tensors["extreme.weight"].scale_dtype == "F32"
            assert tensors["extreme.weight"].scheme == "int4"
            qualities = [t.quality for t in tensors.values()]
            assert all(q and q.sqnr_db and q.sqnr_db > 16 for q in qualities)
            assert len(report.warnings) == 2


def test_weights_of_the_wrong_magnitude_miss_whatever_their_direction(tmp_path: Path) -> None:
    mask = np.triu(np.full((256, 256), -1e9, np.float32))
    save(tmp_path / "m.safetensors", {"mask": mask})
    outputs = specs("parquet", scale_dtype="F16", min_accuracy=0.9)
    report = run(tmp_path / "m.safetensors", tmp_path / "work", outputs)
    assert report.outputs[0].tensors[0].scheme == "none"
    assert "magnitude" in report.outputs[0].tensors[0].rule


@pytest.mark.parametrize("backend", [ReferenceBackend, CpuBackend])
def test_weights_at_the_end_of_float32_are_searched_without_a_complaint(tmp_path: Path, backend: type) -> None:
    x = normal(64, 128)
    save(tmp_path / "m.safetensors", {"a.weight": x / np.abs(x).max() * np.float32(3.4e38)})
    report = run(tmp_path / "m.safetensors", tmp_path / "work", specs("parquet", method="mse"), backend=backend())
    assert report.passed


@pytest.mark.parametrize("shape", [(8192, 1), (4096, 2), (2048, 1, 1, 3)])
def test_nothing_becomes_larger_by_being_quantized(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save(tmp_path / "m.safetensors", {"narrow.weight": normal(*shape, dtype=ml_dtypes.bfloat16)})
    report = run(tmp_path / "m.safetensors", tmp_path / "work", specs("parquet", granularity="channel"))
    [tensor] = report.outputs[0].tensors
    assert tensor.stored_bytes <= tensor.original_bytes
    if tensor.scheme == "none":
        assert any("no fewer bytes" in text for text in report.warnings)


def test_a_source_replaced_while_no_process_ran_is_not_gone_on_with(model: Path, tmp_path: Path) -> None:
    seen: list[Happening] = []

    def stop() -> bool:
        return len({h.name for h in seen if isinstance(h, TensorCompleted)}) >= 3

    with pytest.raises(Cancelled):
        run(model, tmp_path / "work", specs(*BOTH), happenings=seen, cancelled=stop)
    reader = open_model(model)
    other = {
        t.name: reader.rows(t, 0, t.rows).reshape(t.shape) * 2 if t.is_float else np.arange(7) for t in reader.tensors
    }
    save(
        model / "model.safetensors",
        {n: x.astype(ml_dtypes.bfloat16) if n == "layers.0.up.weight" else x for n, x in other.items()},
    )
    run(model, tmp_path / "work", specs(*BOTH))
    run(model, tmp_path / "fresh", specs(*BOTH))
    for folder in ("fresh", "work"):
        (tmp_path / folder / "checkpoint.jsonl").unlink()
    assert files_of(tmp_path / "fresh") == files_of(tmp_path / "work")


def test_what_a_user_hardly_meant_is_told(model: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "work", specs("parquet", skip=["*"], layers=[{"match": "typo.*", "bit_width": 8}]))
    assert any("no tensor is quantized" in text for text in report.warnings)
    assert any("'typo.*'" in text for text in report.warnings)
    assert not run(model, tmp_path / "usual", specs("parquet")).warnings
