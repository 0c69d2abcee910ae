"""A whole server whose GPUs are fibers: lanes, what it says of them, and what becomes of one that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.api.app import create_app
from service.jobs.backend_pool import BackendPool, lanes_of
from service.settings import Settings
from tests.engine.backends.fiber_cuda import FiberCuda
from tests.engine.helpers import normal, save
from tests.server import body


def ended(client: TestClient, source: Path) -> dict[str, Any]:
    """A job that quantizes, when it has come to its end."""
    wait = {"Prefer": "wait=30"}
    job = client.post("/v1/jobs", json=body(source, "parquet", method="minmax"), headers=wait).json()
    while job["status"] in ("queued", "running"):
        job = client.get(f"/v1/jobs/{job['id']}", headers=wait).json()
    return job  # type: ignore[no-any-return]


def test_each_gpu_is_a_lane_and_one_that_fails_is_told_of_and_has_none(
    cuda: FiberCuda, tmp_path: Path, model_root: Path
) -> None:
    source = save(model_root / "fibers.safetensors", {f"layer{i}.weight": normal(64, 256, seed=i) for i in range(3)})
    settings = Settings(data_dir=tmp_path / "data", model_roots=(model_root,), device_memory_bytes=1 << 28)
    with TestClient(create_app(settings), "http://localhost") as client:
        while "being compiled" in client.get("/readyz").text:
            pass
        first = ended(client, source)
        assert (first["status"], first["result"]["backend"]) == ("succeeded", "cuda"), first
        listed = {entry["id"]: entry for entry in client.get("/v1/backends").json()["data"]}
        assert (listed["cuda"]["available"], listed["cuda"]["preferred"]) == (True, True)
        lanes = client.app.state.api.manager._execution._scheduler._lanes
        assert lanes["cuda"].count == 2
        assert client.get("/readyz").json()["lost_devices"] == {}
        cuda.failing = {1}
        again = ended(client, source)
        assert again["status"] == "succeeded", again
        assert [w for w in again["result"]["warnings"] if "another device goes on" in w], again["result"]
        lost = client.get("/readyz").json()["lost_devices"]
        assert list(lost) == ["Fibers 1"]
        assert "cudaErrorIllegalAddress" in lost["Fibers 1"]
        assert lanes["cuda"].count == 1


def test_what_is_set_of_devices_reaches_them(cuda: FiberCuda) -> None:
    assert lanes_of(3, {}) == {"cpu": 3, "cuda": 2}
    assert lanes_of(3, {"cuda": 6}) == {"cpu": 3, "cuda": 6}
    pool = BackendPool(1, 5 << 20)
    assert pool.get("auto").device_memory_bytes == 5 << 20
    assert {made.limit for made in cuda.pools} == {5 << 20}
    assert pool.lanes_left({"cuda": 6, "cpu": 3}) == {}


@pytest.mark.usefixtures("cuda")
def test_of_more_lanes_than_devices_a_like_part_is_left() -> None:
    pool = BackendPool(1)
    cuda = pool.get("cuda")
    assert pool.lanes_left({"cuda": 6}) == {}
    cuda.lost_devices = lambda: {"Fibers 0": "gone"}  # type: ignore[method-assign]
    assert pool.lanes_left({"cuda": 6}) == {"cuda": 3}
    cuda.lost_devices = lambda: {"Fibers 0": "gone", "Fibers 1": "gone"}  # type: ignore[method-assign]
    assert pool.lanes_left({"cuda": 6}) == {"cuda": 0}
