"""Liveness and readiness, and where a server may listen."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from service import __version__
from service.api.app import create_app
from service.api.server import serve
from service.engine.config import QuantizationConfig
from service.errors import InvalidConfig
from service.jobs import standing
from service.jobs.events import Event
from service.jobs.job import Job
from service.jobs.store import Store
from service.settings import Settings
from tests.api.conftest import save_model
from tests.conftest import StartServer
from tests.server import Server, body


def test_a_living_server_says_so(server: Server) -> None:
    assert server.client.get("/healthz").json() == {"status": "ok", "version": __version__}


def test_a_ready_server_says_what_it_computes_with(server: Server) -> None:
    ready = server.client.get("/readyz").json()
    assert ready["status"] == "ready"
    assert ready["backend"] in ("cpu", "cuda")
    assert ready["longest_stall_s"] >= 0
    assert ready["lost_devices"] == {}


def test_a_server_that_cannot_write_is_not_ready(start_server: StartServer) -> None:
    server = start_server()
    shutil.rmtree(server.data_dir)
    response = server.client.get("/readyz")
    assert (response.status_code, response.json()["code"]) == (503, "not_ready")
    assert int(response.headers["retry-after"]) > 0
    assert "data folder" in response.json()["detail"]
    assert server.client.get("/healthz").status_code == 200
    server.kill()


async def test_a_server_that_cannot_store_what_happens_is_not_ready_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_broken, write = True, Store.write

    def write_at_last(store: Store, jobs: Sequence[Job], events: Sequence[Event]) -> None:
        if is_broken:
            raise KeyError("a fault")
        write(store, jobs, events)

    monkeypatch.setattr(Store, "write", write_at_last)
    monkeypatch.setattr(standing, "RESTART_S", 0.1)
    save_model(tmp_path / "models", layers=1)
    config = QuantizationConfig(backend="reference", method="minmax")
    app = create_app(Settings(data_dir=tmp_path / "data", model_roots=(tmp_path,), config_defaults=config))
    async with app.router.lifespan_context(app), client_of(app) as client:
        job = (await client.post("/v1/jobs", json=body(tmp_path / "models", "parquet"))).json()
        answer = await client.get("/readyz")
        for _ in range(1000):
            if "a fault keeps" in answer.text:
                break
            await asyncio.sleep(0.01)
            answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        is_broken = False
        ended = await client.get(f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=60"})
        assert ended.json()["status"] == "succeeded"
        assert (await client.get("/readyz")).status_code == 200


def client_of(app: FastAPI) -> httpx.AsyncClient:
    """Calls an application in this process."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=90.0)


def test_a_port_that_is_taken_is_said_plainly(server: Server) -> None:
    port = int(server.base_url.rsplit(":", 1)[1])
    with pytest.raises(InvalidConfig, match="cannot listen"):
        serve(Settings(port=port))
