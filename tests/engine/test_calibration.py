"""Files of calibration: what is read of them, what of it methods are handed, and what is refused."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.engine.calibration.feed import Averaging, Feed
from service.engine.calibration.opening import open_calibration
from service.engine.inputs import LayerInputs
from service.engine.tensors import TensorInfo
from service.errors import ArrowQuantError, CorruptModel, InvalidCalibration, ModelNotFound
from tests.engine.calibrations import gram, samples, save_parquet, save_safetensors

SAVERS = pytest.mark.parametrize("save", [save_safetensors, save_parquet], ids=["safetensors", "parquet"])


def tensor(name: str, *shape: int) -> TensorInfo:
    """Of a model in float32."""
    return TensorInfo(name, "F32", shape, PurePosixPath("model.safetensors"), 0, 4 * int(np.prod(shape)))


def path_for(save, folder: Path) -> Path:
    """A name that tells what the file is."""
    return folder / ("c.safetensors" if save is save_safetensors else "c.parquet")


def inputs(path: Path, info: TensorInfo, *, weights: list[float] | None = None, most: int = 1000) -> LayerInputs | None:
    """What a method is handed."""
    with closing(open_calibration(path)) as calibration:
        steps = len(calibration.timesteps)
        share = np.array(weights or [1.0] * steps) / sum(weights or [1.0] * steps)
        return Feed(calibration, Averaging(share, most)).inputs(info)


@SAVERS
def test_what_was_measured_is_what_a_method_is_handed(save, tmp_path: Path) -> None:
    fed = samples(200, 48)
    entries = {"a.gram": gram(fed), "b.mean_square": (fed**2).mean(0)[None], "b.absmax": np.abs(fed).max(0)[None]}
    path = save(path_for(save, tmp_path), entries)
    a, b = inputs(path, tensor("a.weight", 8, 48)), inputs(path, tensor("b.weight", 8, 48))
    assert np.array_equal(a.gram, gram(fed))
    assert a.mean_square == pytest.approx(np.diag(gram(fed)))
    assert a.absmax is None
    assert b.gram is None
    assert b.mean_square == pytest.approx((fed**2).mean(0))
    assert b.absmax == pytest.approx(np.abs(fed).max(0))
    assert inputs(path, tensor("c.weight", 8, 48)) is None


@SAVERS
def test_raw_samples_become_statistics_of_each_timestep_in_its_share(save, tmp_path: Path) -> None:
    first, second = samples(30, 16, seed=1), samples(10, 16, seed=2)
    entries = {
        "timesteps": np.array([900, 100]),
        "a.samples": np.concatenate([first, second]),
        "a.sample_timestep": np.array([900] * 30 + [100] * 10),
    }
    path = save(path_for(save, tmp_path), entries)
    alike, last = (inputs(path, tensor("a.weight", 8, 16), weights=w) for w in ([1, 1], [0, 1]))
    assert alike.gram == pytest.approx((gram(first) + gram(second)) / 2, rel=1e-4, abs=1e-4)
    assert last.gram == pytest.approx(gram(second), rel=1e-4, abs=1e-4)
    assert last.mean_square == pytest.approx((second**2).mean(0), rel=1e-5)
    assert last.absmax == pytest.approx(np.abs(second).max(0))


def test_of_many_samples_as_many_as_were_asked_for_are_used_of_each_timestep(tmp_path: Path) -> None:
    fed = samples(4000, 700)  # more than are read at once
    entries = {"timesteps": np.array([0, 1]), "a.samples": fed, "a.sample_timestep": np.arange(4000) % 2}
    path = save_safetensors(tmp_path / "c.safetensors", entries)
    found = inputs(path, tensor("a.weight", 8, 700), most=5)
    used = np.concatenate([np.linspace(0, 1999, 5).astype(int) * 2 + step for step in (0, 1)])
    assert found.gram == pytest.approx(gram(fed[used]), rel=1e-4, abs=1e-4)


def test_timesteps_count_by_their_weights_unless_the_layer_was_not_fed_then(tmp_path: Path) -> None:
    square = np.arange(1.0, 13.0).reshape(3, 4)
    entries = {
        "timesteps": np.arange(3),
        "a.mean_square": square,
        "b.mean_square": square,
        "b.count": np.array([4, 0, 2]),
    }
    path = save_safetensors(tmp_path / "c.safetensors", entries)
    a, b = (inputs(path, tensor(f"{name}.weight", 8, 4), weights=[1, 2, 1]) for name in "ab")
    assert a.mean_square == pytest.approx(square.T @ [0.25, 0.5, 0.25])
    assert b.mean_square == pytest.approx(square.T @ [0.5, 0.0, 0.5])


def test_a_convolution_has_as_many_inputs_as_its_kernel_sees(tmp_path: Path) -> None:
    path = save_safetensors(tmp_path / "c.safetensors", {"conv.gram": gram(samples(40, 36))})
    assert inputs(path, tensor("conv.weight", 8, 4, 3, 3)).cols == 36


@SAVERS
def test_layers_that_share_their_input_share_what_is_derived_from_it(save, tmp_path: Path) -> None:
    path = save(path_for(save, tmp_path), {"q.gram": gram(samples(40, 16))}, {"k": "q", "v": "q"})
    with closing(open_calibration(path)) as calibration:
        feed = Feed(calibration, Averaging(np.ones(1), 1))
        q, k, v = (feed.inputs(tensor(f"{name}.weight", rows, 16)) for name, rows in (("q", 64), ("k", 8), ("v", 8)))
    assert q is k is v
    assert np.array_equal(q.gram, gram(samples(40, 16)))


def test_layers_of_the_calibration_that_the_model_has_not_are_known(tmp_path: Path) -> None:
    path = save_safetensors(tmp_path / "c.safetensors", {f"{x}.gram": gram(samples(9, 8)) for x in "ab"}, {"c": "a"})
    with closing(open_calibration(path)) as calibration:
        assert calibration.unmatched([tensor("a.weight", 4, 8)]) == ["b", "c"]


SQUARE = np.ones((1, 8), np.float32)
GRAM = np.eye(8, dtype=np.float32)


def with_value(array: np.ndarray, value: float, *at: int) -> np.ndarray:
    """A copy with one element changed."""
    changed = array.copy()
    changed[at] = value
    return changed


@SAVERS
@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"a.gram": GRAM[:7, :7]}, "a.gram has the shape [7, 7], and a.weight of shape [4, 8]"),
        ({"a.gram": GRAM[:7, :7]}, "wants [8, 8]"),
        ({"a.gram": with_value(GRAM, np.nan, 0, 3)}, "a.gram is not symmetric"),
        ({"a.gram": with_value(GRAM, 0.5, 0, 3)}, "a.gram is not symmetric"),
        ({"a.gram": with_value(GRAM, -1.0, 2, 2)}, "on its diagonal"),
        ({"a.gram": with_value(GRAM, np.inf, 2, 2)}, "on its diagonal"),
        ({"a.mean_square": SQUARE[0]}, "a.mean_square has the shape [8]"),
        ({"timesteps": np.arange(3), "a.mean_square": SQUARE}, "with 3 timesteps wants [3, 8]"),
        ({"a.mean_square": -SQUARE}, "a.mean_square holds"),
        ({"a.absmax": with_value(SQUARE, np.nan, 0, 0)}, "a.absmax holds"),
        ({"a.range": np.zeros((1, 3))}, "a.range has the shape [1, 3]"),
        ({"a.mean_square": SQUARE, "a.count": np.array([0])}, "a.count says"),
        ({"a.mean_square": SQUARE, "a.count": np.array([np.nan])}, "a.count holds"),
        ({"timesteps": np.array([1, 1]), "a.mean_square": np.ones((2, 8))}, "timesteps holds"),
        ({"timesteps": np.ones((2, 2)), "a.mean_square": SQUARE}, "timesteps has the shape [2, 2]"),
        ({"a.samples": with_value(np.ones((3, 8)), np.inf, 2, 2)}, "a.samples holds"),
        ({"a.samples": np.ones((0, 8))}, "a.samples has none"),
        ({"timesteps": np.arange(2), "a.samples": np.ones((3, 8))}, "give .sample_timestep as well"),
        (
            {"timesteps": np.arange(2), "a.samples": np.ones((2, 8)), "a.sample_timestep": np.array([0, 7])},
            "names the step 7",
        ),
        ({"a.mean_square": SQUARE, "a.sample_timestep": np.zeros(3)}, "a.sample_timestep is there without"),
        ({"a.grams": GRAM}, "entry 'a.grams'"),
        ({"timesteps": np.arange(3)}, "has no layers"),
    ],
)
def test_what_cannot_be_is_refused_with_the_name_of_what_is_wrong(save, entries, says: str, tmp_path: Path) -> None:
    path = save(path_for(save, tmp_path), entries)
    with pytest.raises(InvalidCalibration) as refused:
        inputs(path, tensor("a.weight", 4, 8))
    assert says in refused.value.detail


@pytest.mark.parametrize(
    ("shared", "says"), [({"b": "c"}, "no such layer"), ({"a": "a"}, "entries of its own"), (["a"], "not an object")]
)
def test_sharing_that_leads_nowhere_is_refused(shared, says: str, tmp_path: Path) -> None:
    path = save_safetensors(tmp_path / "c.safetensors", {"a.gram": GRAM}, shared)
    with pytest.raises(InvalidCalibration, match=says):
        open_calibration(path)


def test_a_parquet_row_whose_bytes_are_not_its_shape_is_refused(tmp_path: Path) -> None:
    path = save_parquet(tmp_path / "c.parquet", {"a.mean_square": SQUARE})
    table = pq.read_table(path)
    pq.write_table(table.set_column(3, table.schema.field("data"), pa.array([b"abc"], pa.large_binary())), path)
    with pytest.raises(InvalidCalibration, match="3 bytes of data"):
        inputs(path, tensor("a.weight", 4, 8))


def test_a_folder_is_a_calibration_where_one_file_of_it_can_be(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "c.safetensors", {"a.gram": GRAM})
    (tmp_path / "notes.txt").write_text("how it was made")
    open_calibration(tmp_path).close()
    save_parquet(tmp_path / "d.parquet", {"a.gram": GRAM})
    with pytest.raises(InvalidCalibration, match="one file"):
        open_calibration(tmp_path)


@pytest.mark.parametrize("name", ["c.safetensors", "c.parquet", "c.gguf"])
def test_damaged_files_are_refused(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / name).write_bytes(rng.bytes(1000))
    with pytest.raises((CorruptModel, InvalidCalibration)):
        open_calibration(tmp_path / name)
    with pytest.raises(ModelNotFound):
        open_calibration(tmp_path / f"other-{name}")


def test_another_file_is_another_calibration(tmp_path: Path) -> None:
    one = save_safetensors(tmp_path / "c.safetensors", {"a.gram": GRAM})
    two = save_safetensors(tmp_path / "d.safetensors", {"a.gram": GRAM})
    seen = []
    for path in (one, one, two):
        with closing(open_calibration(path)) as calibration:
            seen.append(calibration.identity)
    assert seen[0] == seen[1] != seen[2]


def test_an_error_tells_which_tensor_it_is_about(tmp_path: Path) -> None:
    path = save_safetensors(tmp_path / "c.safetensors", {"a.gram": with_value(GRAM, -1.0, 2, 2)})
    with pytest.raises(ArrowQuantError) as refused:
        inputs(path, tensor("a.weight", 4, 8))
    assert refused.value.tensor == "a.weight"
