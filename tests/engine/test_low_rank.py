"""A low-rank part beside the codes: what it gains, that it is stored and counted, and when it is left out."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.engine.backends.cpu import CpuBackend
from service.engine.budget import within_budgets
from service.engine.config import Profile, QuantizationConfig, resolve
from service.engine.formats import parquet_writer
from service.engine.formats.registry import open_model
from service.engine.inputs import LayerInputs
from service.engine.low_rank import LowRank, find_down
from service.engine.methods.mse import Mse
from service.engine.methods.svd import Svd
from service.engine.plan import check_outputs, make_plan
from service.engine.progress import Happening, TensorCompleted
from service.engine.report import OutputReport
from service.engine.schemes.registry import build_scheme
from service.errors import Cancelled, CorruptModel, InvalidConfig, UnsupportedByFormat
from tests.engine.calibrations import gram, samples, save_safetensors
from tests.engine.formats.test_docs_parquet import page_code
from tests.engine.helpers import files_of, normal, run, save, specs

BACKEND = CpuBackend()
INT3 = build_scheme("int3", symmetric=False, group_size=64)
ROWS, COLS = 192, 256
SVD = {"method": "svd", "svd_rank": 16, "bit_width": 3, "group_size": 64}


def weights() -> np.ndarray:
    """Normal ones, and large ones of rank 4."""
    return normal(ROWS, COLS, seed=4) + normal(ROWS, 4, seed=5) @ normal(4, COLS, seed=6) * 40


def fed_with(folder: Path) -> Path:
    return save_safetensors(folder / "c.safetensors", {"a.gram": gram(samples(400, COLS))})


def quantized(folder: Path, w: np.ndarray, calibration: Path | None = None, **config: Any) -> OutputReport:
    source = save(folder / "m.safetensors", {"a.weight": w})
    outputs = specs("parquet", **config)
    return run(source, folder / "work", outputs, calibration=calibration, backend=BACKEND).outputs[0]


def read_back(folder: Path) -> np.ndarray:
    with closing(open_model(folder / "work" / "parquet")) as reader:
        return np.asarray(reader.rows(reader.tensors[0], 0, ROWS))


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_what_counts_is_lost_less_with_it_than_without(tmp_path: Path, is_calibrated: bool) -> None:
    calibration = fed_with(tmp_path) if is_calibrated else None
    lost = {}
    for method in ({"method": "mse", "bit_width": 3, "group_size": 64}, SVD):
        sums = quantized(tmp_path / str(method["method"]), weights(), calibration, **method).sums
        lost[method["method"]] = sums.output_relative_error if is_calibrated else sums.relative_error
    assert lost["svd"] < 0.6 * lost["mse"]


@pytest.mark.parametrize("granularity", ["group", "tensor"])
def test_it_is_stored_read_back_counted_and_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: str
) -> None:
    monkeypatch.setattr(parquet_writer, "CHUNK_BYTES", 24 * 256)  # so that the tensor takes several rows of the file
    config = SVD | {"granularity": granularity, "group_size": 64 if granularity == "group" else None}
    output = quantized(tmp_path, weights(), fed_with(tmp_path), **config)
    [tensor], read = output.tensors, read_back(tmp_path)
    assert tensor.sums is not None
    assert tensor.method == "svd"
    assert BACKEND.compare(weights(), read).sum_dd == pytest.approx(tensor.sums.sum_dd, rel=1e-5)
    grids = ROWS * 4 if granularity == "group" else 3  # with each row of the file
    assert tensor.stored_bytes == ROWS * COLS * 3 // 8 + grids * 3 + 2 * 16 * (ROWS + COLS)

    [file] = (tmp_path / "work" / "parquet").glob("**/*.parquet")
    np.testing.assert_allclose(page_code()["load"](file, "a.weight"), read, rtol=1e-5, atol=1e-6)
    rows = pq.read_table(file).to_pylist()
    assert len(rows) == 3
    assert [row["low_rank_down"] is None for row in rows] == [False] + [True] * (len(rows) - 1)
    scheme = build_scheme("int3", symmetric=False, granularity=granularity, group_size=config["group_size"])
    counted = scheme.stored_bytes(ROWS, COLS) + 2 * 16 * (ROWS + COLS)
    assert rows[0]["bits_per_weight"] == pytest.approx(8 * counted / (ROWS * COLS))
    with closing(open_model(tmp_path / "m.safetensors")) as reader:
        plan = make_plan(reader, specs("parquet", **config))
    assert plan.predicted_bytes(0) == tensor.stored_bytes - (6 if granularity == "tensor" else 0)
    with closing(open_model(tmp_path / "work" / "parquet")) as reader:
        assert reader.tensors[0].nbytes == tensor.stored_bytes
        for start, stop in ((0, 3), (70, 131), (191, 192)):
            np.testing.assert_allclose(reader.rows(reader.tensors[0], start, stop), read[start:stop], rtol=1e-5)


@pytest.mark.parametrize("knows", ["gram", "mean_square", "nothing"])
def test_the_directions_are_those_of_the_singular_vectors(knows: str) -> None:
    w, fed = weights().astype(np.float64), samples(400, COLS)
    known = {"gram": gram(fed)} if knows == "gram" else {"mean_square": (fed**2).mean(0)}
    inputs = LayerInputs(COLS, **known) if knows != "nothing" else None
    metric = np.eye(COLS)
    if inputs is not None:
        metric = np.diag(inputs.weights) if inputs.gram is None else inputs.gram.astype(np.float64)
    down = find_down(lambda: [w[:100], w[100:]], ROWS, COLS, 16, inputs)
    assert down is not None
    left = w - w @ LowRank.of(down, inputs).solve @ down.astype(np.float64)
    best = np.linalg.svd(w @ np.linalg.cholesky(metric + 1e-9 * np.trace(metric) / COLS * np.eye(COLS)))[1]
    assert np.trace(left @ metric @ left.T) == pytest.approx((best[16:] ** 2).sum(), rel=0.02)


def test_each_row_is_corrected_for_what_its_codes_lose() -> None:
    w, inputs = normal(ROWS, COLS, seed=4), LayerInputs(COLS, gram=gram(samples(400, COLS)))
    down = find_down(lambda: [w], ROWS, COLS, 16, inputs)
    assert down is not None
    low_rank = LowRank.of(down, inputs)
    once = BACKEND.quantize(low_rank.apply(w), INT3, Mse(), None, inputs)
    assert low_rank.quantize(w, INT3, Mse(), None, BACKEND).errors.out_dd < 0.6 * once.errors.out_dd


@pytest.mark.parametrize(
    "w",
    [np.zeros((ROWS, COLS), np.float32), np.full((ROWS, COLS), 1e30, np.float32), np.sign(normal(ROWS, COLS)) * 0.5],
    ids=["zeros", "huge", "exact"],
)
def test_a_tensor_that_gains_nothing_does_without(tmp_path: Path, w: np.ndarray) -> None:
    config = SVD | {"bit_width": 2, "scale_dtype": "F32"}
    [tensor] = quantized(tmp_path, w, **config, on_failure="warn").tensors
    plain = quantized(tmp_path / "plain", w, **config | {"method": "mse", "svd_rank": None}, on_failure="warn")
    assert tensor.stored_bytes == plain.tensors[0].stored_bytes
    assert tensor.method == "mse"
    assert "a low-rank part gains nothing" in tensor.rule
    assert np.isfinite(read_back(tmp_path)).all()


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {f"{name}.weight": weights() for name in "abc"})
    seen: list[Happening] = []
    run(source, tmp_path / "undisturbed", specs("parquet", **SVD), backend=BACKEND)

    def stop() -> bool:
        return any(isinstance(each, TensorCompleted) for each in seen)

    with pytest.raises(Cancelled):
        run(source, tmp_path / "work", specs("parquet", **SVD), backend=BACKEND, happenings=seen, cancelled=stop)
    spools = list((tmp_path / "work").glob("**/*spool-low_rank*"))
    assert len(spools) == 2
    for spool in spools:
        with spool.open("ab") as file:
            file.write(b"written after the last checkpoint")
    run(source, tmp_path / "work", specs("parquet", **SVD), backend=BACKEND)
    [ours, theirs] = (files_of(tmp_path / folder / "parquet") for folder in ("work", "undisturbed"))
    assert {k: v for k, v in ours.items() if k.endswith(".parquet")} == {
        k: v for k, v in theirs.items() if k.endswith(".parquet")
    }


def test_weights_that_are_not_finite_are_told_of(tmp_path: Path) -> None:
    w = weights()
    w[100, 3] = np.nan
    [tensor] = quantized(tmp_path, w, **SVD, on_non_finite="copy").tensors
    assert tensor.scheme == "none"


def test_small_matrices_have_none(tmp_path: Path) -> None:
    [tensor] = quantized(tmp_path, normal(16, COLS), **SVD).tensors
    assert tensor.method == "mse"
    assert "too small for a low-rank part of rank 16" in tensor.rule


def test_widths_are_chosen_with_it_counted(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {"a.weight": weights()})
    outputs = specs("parquet", **SVD | {"bit_width": "auto", "target_bits_per_weight": 7.0})
    with closing(open_model(source)) as reader:
        memo, told = tmp_path / "memo", list[Happening]()
        plan = within_budgets(
            make_plan(reader, outputs), reader, backend=BACKEND, memo=memo, report=told.append, cancelled=lambda: False
        )
    [decision] = plan.tensors[0].decisions
    # The low-rank part takes 2.3 of the bits, and the grids of groups of 64 take 0.4.
    assert decision.scheme is not None
    assert (decision.scheme.id, decision.method) == ("int4", Svd(rank=16))


def test_a_rank_goes_with_the_method_within_its_bounds() -> None:
    for wrong, text in (({"svd_rank": 32}, "goes with method svd, not mse"), ({"svd_rank": 8}, "16")):
        with pytest.raises((InvalidConfig, ValueError), match=text):
            resolve(Profile.LOCAL, [QuantizationConfig(**wrong)])
    lower = QuantizationConfig(method="svd", svd_rank=64)
    assert resolve(Profile.LOCAL, [lower]).svd_rank == 64
    assert resolve(Profile.LOCAL, [lower, QuantizationConfig(method="gptq")]).svd_rank is None


def test_a_format_whose_loaders_add_nothing_refuses_the_method() -> None:
    with pytest.raises(UnsupportedByFormat, match="choose `parquet`, or another method"):
        check_outputs(specs("compressed-tensors", **SVD))


@pytest.mark.parametrize(("column", "size"), [("low_rank_up", 2), ("low_rank_down", 2), ("low_rank_down", None)])
def test_parts_of_another_size_are_refused(tmp_path: Path, column: str, size: int | None) -> None:
    quantized(tmp_path, weights(), **SVD)
    [file] = (tmp_path / "work" / "parquet").glob("**/*.parquet")
    table = pq.read_table(file)
    cells = [cell[:-size] if cell and size else None for cell in table[column].to_pylist()]
    changed = table.set_column(table.schema.names.index(column), column, pa.array(cells, pa.large_binary()))
    pq.write_table(changed, file, use_dictionary=False, compression="none")
    with pytest.raises(CorruptModel, match="low_rank"):
        read_back(tmp_path)
