"""pyarrow alone reads what we write."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from service.engine.formats.registry import find_format
from service.engine.schemes.registry import build_scheme
from tests.engine.formats.outputs import Item, Output, normal

INT4 = build_scheme("int4", symmetric=False, group_size=32)


def write(folder: Path) -> list[Item]:
    """Several files of a small model."""
    items = [Item(f"l{i}.weight", normal(64, 96, seed=i), INT4) for i in range(5)]
    items.append(Item("bias", normal(11)))
    Output(folder, find_format("parquet"), items, {"max_file_bytes": 4000}).run()
    return items


def test_a_dataset_over_the_folder_has_all_tensors_with_their_hashes(tmp_path: Path) -> None:
    items = write(tmp_path)
    table = ds.dataset(sorted(tmp_path.glob("*.parquet")), format="parquet").to_table()
    assert [row["layer_name"] for row in table.to_pylist()] == [item.name for item in items]
    for row in table.to_pylist():
        assert hashlib.sha256(row["data"]).hexdigest() == row["sha256"]


def test_a_copy_is_its_own_bytes(tmp_path: Path) -> None:
    items = write(tmp_path)
    table = ds.dataset(sorted(tmp_path.glob("*.parquet")), format="parquet").to_table(
        filter=ds.field("layer_name") == "bias"
    )
    np.testing.assert_array_equal(np.frombuffer(table["data"][0].as_py(), "<f4"), items[-1].data)


def test_names_can_be_looked_up_by_their_statistics_without_reading_weights(tmp_path: Path) -> None:
    write(tmp_path)
    metadata = pq.read_metadata(sorted(tmp_path.glob("*.parquet"))[0])
    names = metadata.schema.names
    group = metadata.row_group(0)
    assert group.column(names.index("layer_name")).statistics.min == "l0.weight"
    assert group.column(names.index("data")).statistics is None
