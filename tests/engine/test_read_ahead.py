"""Reading ahead changes nothing but the time."""

from __future__ import annotations

import threading
from pathlib import Path
from queue import Queue

import numpy as np
import pytest

from service.engine.blocks import row_blocks
from service.engine.formats.base import ModelReader
from service.engine.formats.registry import open_model
from service.engine.plan import make_plan
from service.engine.read_ahead import ReadAhead
from service.engine.tensors import Array, TensorInfo
from service.errors import SourceChanged
from tests.engine.helpers import normal, save, specs

BLOCK_BYTES = 1 << 20
TENSORS = {
    "a.weight": normal(1536, 512, seed=1),
    "norm.weight": normal(64, seed=2),
    "b.weight": normal(1024, 512, seed=3),
}


class Recorder(ModelReader):
    """A reader that keeps what was read of it."""

    def __init__(self, reader: ModelReader) -> None:
        self._reader = reader
        self.format_id = reader.format_id
        self.layout, self.files, self.tensors = reader.layout, reader.files, reader.tensors
        self.read: Queue[tuple[str, int]] = Queue()

    def rows(self, info: TensorInfo, start: int, stop: int) -> Array:
        self.read.put((info.name, start))
        return self._reader.rows(info, start, stop)

    def raw(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        self.read.put((info.name, start))
        return self._reader.raw(info, start, stop)

    def close(self) -> None:
        self._reader.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "model.safetensors", TENSORS)


def _ahead(reader: ModelReader, **config: object) -> ReadAhead:
    return ReadAhead(reader, make_plan(reader, specs("parquet", **config)), BLOCK_BYTES)


def _read(reader: ModelReader, name: str) -> np.ndarray:
    info = reader.find(name)
    assert info is not None
    return np.concatenate([reader.rows(info, *span) for span in row_blocks(info, BLOCK_BYTES)])


@pytest.mark.parametrize("order", ["a b", "a a b", "b a", "a b b a"])
@pytest.mark.parametrize("granularity", ["group", "tensor"])
def test_rows_are_the_same_in_whatever_order_they_are_asked_for(source: Path, order: str, granularity: str) -> None:
    reader = open_model(source)
    ahead = _ahead(reader, granularity=granularity)
    for letter in order.split():
        np.testing.assert_array_equal(_read(ahead, f"{letter}.weight"), TENSORS[f"{letter}.weight"])
    ahead.close()
    reader.close()


def test_what_comes_next_is_read_before_it_is_asked_for_over_what_is_copied_between(source: Path) -> None:
    reader = Recorder(open_model(source))
    ahead = _ahead(reader)
    info = reader.find("a.weight")
    assert info is not None
    for start, stop in ((0, 512), (512, 1024), (1024, 1536)):
        ahead.rows(info, start, stop)
    read = [reader.read.get(timeout=60) for _ in range(4)]
    assert read == [("a.weight", 0), ("a.weight", 512), ("a.weight", 1024), ("b.weight", 0)]
    ahead.close()
    reader.close()


def test_a_short_last_block_is_no_reason_not_to_read_the_next_tensor(source: Path) -> None:
    reader = Recorder(open_model(source))
    ahead = _ahead(reader)
    info = reader.find("a.weight")
    assert info is not None
    for start, stop in ((0, 768), (768, 1500), (1500, 1536)):
        ahead.rows(info, start, stop)
    read = [reader.read.get(timeout=60) for _ in range(5)]
    assert set(read) >= {("a.weight", 1500), ("b.weight", 0)}
    ahead.close()
    reader.close()


def test_what_is_copied_is_read_ahead_as_well(tmp_path: Path) -> None:
    source = save(tmp_path / "model.safetensors", {name: np.arange(1 << 19) for name in ("a", "b")})
    reader = Recorder(open_model(source))
    ahead = _ahead(reader)
    first = reader.tensors[0]
    chunks = [ahead.raw(first, start, start + BLOCK_BYTES) for start in range(0, first.nbytes, BLOCK_BYTES)]
    read = [reader.read.get(timeout=60) for _ in range(5)]
    assert read == [*(("a", start) for start in range(0, first.nbytes, BLOCK_BYTES)), ("b", 0)]
    assert b"".join(chunks) == reader.raw(first, 0, first.nbytes)
    ahead.close()
    reader.close()


def test_a_source_that_changes_is_told_of_when_its_rows_are_asked_for(source: Path) -> None:
    reader = open_model(source)
    ahead = _ahead(reader)
    info = reader.find("a.weight")
    assert info is not None
    ahead.rows(info, 0, 512)
    source.write_bytes(source.read_bytes()[:-8])
    with pytest.raises(SourceChanged):
        _read(ahead, "a.weight")
    ahead.close()
    reader.close()


def test_no_thread_is_left(source: Path) -> None:
    before = threading.active_count()
    reader = open_model(source)
    ahead = _ahead(reader)
    _read(ahead, "a.weight")
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before
    reader.close()
