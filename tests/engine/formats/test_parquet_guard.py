"""A Parquet file that claims more than it holds is refused before Arrow allocates what it claims."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.fuzzing.seeds import parquet_folder
from service.engine.formats.thrift import CompactReader, Malformed

TABLE = pq.read_table(io.BytesIO(parquet_folder()["model-00000.parquet"]))
ROW: dict[str, Any] = TABLE.slice(0, 1).to_pylist()[0]
MIB = 1 << 20
#: What a process may grow by that opens any of these.
BOUND = 400 * MIB

OPEN = """
import json, resource, sys
from pathlib import Path
from service.engine.formats.registry import open_model
from service.errors import ArrowQuantError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
try:
    told = f"read {len(open_model(Path(sys.argv[1])).tensors)}"
except ArrowQuantError as error:
    told = f"{error.code}: {error.detail}"
print(json.dumps([told, peak() - before]))
"""


def opened(path: Path) -> tuple[str, int]:
    """What came of a file in a process of its own, and the memory that took."""
    done = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    told, grown = json.loads(done.stdout)
    print(f"{path.stat().st_size} bytes: {told}, {grown / MIB:.0f} MiB")
    return told, grown


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    """A file of these rows in one row group."""
    table = pa.Table.from_pylist(rows, schema=TABLE.schema)
    pq.write_table(table, path, row_group_size=1 << 20, **({"write_statistics": False} | options))
    return path


def long_name(count: int) -> list[dict[str, Any]]:
    """Rows that share a name of a million bytes."""
    return [ROW | {"layer_name": "x" * 10**6}] * count


BOMBS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "zeros compressed": (
        lambda: [ROW | {"scales": bytes(300 * MIB)}],
        {"compression": "zstd", "use_dictionary": False},
        "may unpack to",
    ),
    "a text in a dictionary, many times": (lambda: long_name(500), {"compression": "none"}, "may unpack to"),
    "a text as the prefix of itself, many times": (
        lambda: long_name(500),
        {"compression": "none", "use_dictionary": False, "column_encoding": {"layer_name": "DELTA_BYTE_ARRAY"}},
        "DELTA_BYTE_ARRAY",
    ),
    "a shape of ten million sizes": (
        lambda: [ROW | {"shape": [1] * 10**7}],
        {"compression": "zstd"},
        "claims 10000000 values",
    ),
    "more rows than a model has tensors": (lambda: [ROW] * 300_000, {"compression": "zstd"}, "claims 300000 rows"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_that_stands_for_much_is_refused_in_bounded_memory(tmp_path: Path, bomb: str) -> None:
    rows, options, text = BOMBS[bomb]
    told, grown = opened(write(tmp_path / "bomb.parquet", rows(), **options))
    assert told.startswith("corrupt_model: bomb.parquet is damaged, or made to do harm"), told
    assert text in told
    assert grown < BOUND


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zstd", "data_page_version": "2.0"},
        {"compression": "gzip", "use_dictionary": False, "write_statistics": True},
        {"compression": "none", "data_page_size": 64},
    ],
)
def test_what_others_write_anew_is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    told, grown = opened(write(tmp_path / "again.parquet", TABLE.to_pylist(), **options))
    assert told == "read 3"
    assert grown < BOUND


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "too early"),
        (b"\x15", "too early"),
        (b"\x15\x02\x05\x02\x02\x00", "twice"),
        (b"\x1c" * 40, "nested"),
        (b"\x19" * 40, "list"),
        (b"\x18\xff\xff\xff\xff\x0f", "claims"),
        (b"\x19\xf5\xff\xff\xff\xff\x0f", "claims"),
        (b"\x15" + b"\xff" * 11, "ten bytes"),
        (b"\x1b\x00", "maps"),
        (b"\x1f\x00", "no type"),
    ],
)
def test_a_header_that_is_none_is_told_from_one(data: bytes, text: str) -> None:
    with pytest.raises(Malformed, match=text):
        CompactReader(data).struct()
