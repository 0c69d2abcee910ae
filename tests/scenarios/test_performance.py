"""What work costs, counted and not timed: bytes that are read and written, events, rows."""

from __future__ import annotations

import sqlite3
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import StartServer
from tests.engine.helpers import save
from tests.scenarios.conftest import NewModel
from tests.server import Server, body

MIB = 1 << 20
SOURCE_BYTES = 64 * MIB


@pytest.fixture(scope="module")
def sizeable(model_root: Path) -> Path:
    """A model of some tensors, large enough that what is not weights does not count."""
    random = np.random.default_rng(5)
    tensors = {f"l.{i}.weight": random.standard_normal((1024, 4096), np.float32) for i in range(4)}
    return save(model_root / "sizeable" / "model.safetensors", tensors).parent


def moved(server: Server, model: Path, *outputs: str) -> tuple[int, int, int]:
    """Bytes that the server's calls read and wrote for a job, and the bytes of its artifacts."""
    before = server.io()
    job = server.run(body(model, *outputs, bit_width=4, method="minmax"))
    after = server.io()
    written = sum(artifact["size_bytes"] for artifact in server.artifacts(job["id"]))
    return after["rchar"] - before["rchar"], after["wchar"] - before["wchar"], written


def test_one_read_of_the_source_serves_all_outputs(start_server: StartServer, sizeable: Path) -> None:
    server = start_server(threads=2)
    server.run(body(sizeable, "compressed-tensors", "parquet", bit_width=4, method="minmax"))  # compiled, imported
    for outputs in (("compressed-tensors",), ("parquet",), ("compressed-tensors", "parquet")):
        read, wrote, size = moved(server, sizeable, *outputs)
        print(
            f"{' and '.join(outputs)}: read {read / SOURCE_BYTES:.3f}, wrote {wrote / size:.3f} times"
            f" the bytes of the source and of the artifacts ({size / MIB:.1f} MiB)"
        )
        # The artifacts are read once more to be hashed, and Parquet's also to be put together.
        assert SOURCE_BYTES <= read <= 1.02 * SOURCE_BYTES + 3 * size
        assert wrote <= 3 * size + MIB


def test_a_granularity_that_needs_a_second_pass_reads_twice_and_not_more(
    start_server: StartServer, sizeable: Path
) -> None:
    server = start_server(threads=2)
    asked = body(sizeable, "compressed-tensors", bit_width=8, granularity="tensor")
    server.run(asked)
    before = server.io()["rchar"]
    job = server.run(asked)
    size = sum(artifact["size_bytes"] for artifact in server.artifacts(job["id"]))
    read = server.io()["rchar"] - before
    assert 2 * SOURCE_BYTES <= read <= 2.02 * SOURCE_BYTES + 3 * size


def test_outputs_have_the_size_that_their_bits_make(server: Server, sizeable: Path) -> None:
    for bits in (2, 4, 8):
        config = {"bit_width": bits, "group_size": 128, "symmetric": False, "min_accuracy": 0}
        job = server.run(body(sizeable, "compressed-tensors", "parquet", **config))
        for output in server.report(job["id"])["outputs"]:
            # Codes; for each group a scale of 16 bits, and a zero point: packed like codes, or a byte.
            zero_bits = 8 if output["format"] == "parquet" else bits
            bits_per_weight = bits + (16 + zero_bits) / 128
            assert output["bits_per_weight"] == pytest.approx(bits_per_weight, rel=1e-3)
            expected = SOURCE_BYTES / 4 * bits_per_weight / 8
            size = sum(file["size_bytes"] for file in output["files"])
            print(f"{output['name']} at {bits} bits: {size / expected:.4f} of what codes, scales and zero points take")
            assert expected <= size <= 1.01 * expected + 64 * 1024


def test_a_small_job_costs_few_events_rows_and_bytes(start_server: StartServer, new_model: NewModel) -> None:
    server = start_server()
    model = new_model(layers=3)
    first = server.run(body(model, "parquet", "compressed-tensors"))
    assert len(server.follow(first["id"])) == 3 * 2 + 3
    ids = [server.run(body(model, "parquet", "compressed-tensors"))["id"] for _ in range(20)]
    answer = len(server.client.get(f"/v1/jobs/{ids[-1]}").content)
    server.stop()
    database = next(server.data_dir.glob("*.sqlite3"))
    with sqlite3.connect(database) as connection:
        rows = dict(connection.execute("SELECT job_id, count(*) FROM events GROUP BY job_id"))
    connection.close()
    assert [rows[job_id] for job_id in ids] == [9] * 20
    per_job = database.stat().st_size / 21
    print(f"{per_job / 1024:.1f} KiB of database for a job, {answer / 1024:.1f} KiB to show it")
    assert per_job < 32 * 1024


def test_asking_again_for_what_one_has_costs_no_body(server: Server, new_model: NewModel) -> None:
    job = server.run(body(new_model(), "compressed-tensors"))
    links = job["links"]
    addresses = [links["self"], links["report"], links["artifacts"], links["archive"]]
    addresses.append(f"{links['artifacts']}/compressed-tensors/model.safetensors")
    for address in addresses:
        first = server.client.get(address)
        again = server.client.get(address, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b""), address


def test_a_kept_connection_answers_no_slower_than_a_new_one(server: Server, new_model: NewModel) -> None:
    # With Nagle's algorithm on, each answer but the first of a connection waits 40 ms for an acknowledgement.
    address = f"/v1/jobs/{server.run(body(new_model(layers=1), 'parquet'))['id']}"

    def median_s(get: Callable[[], httpx.Response]) -> float:
        seconds = []
        for _ in range(25):
            begun = time.perf_counter()
            assert get().status_code == 200
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds)

    kept = median_s(lambda: server.client.get(address))
    with httpx.Client(base_url=server.base_url, headers={"Connection": "close"}) as anew:
        new = median_s(lambda: anew.get(address))
    print(f"{kept * 1000:.1f} ms on a kept connection, {new * 1000:.1f} ms on a new one")
    assert kept < 3 * new
