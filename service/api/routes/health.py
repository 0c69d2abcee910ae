"""Whether the process lives, and whether it takes jobs."""

from __future__ import annotations

import tempfile

from anyio.to_thread import run_sync
from fastapi import APIRouter, Response

from service import __version__
from service.api.dependencies import State
from service.api.problems import documented
from service.api.replies import reply
from service.api.schemas.catalog import Health, Readiness
from service.api.state import ApiState
from service.errors import NotReady

router = APIRouter(tags=["health"])


@router.get("/healthz", response_model=Health)
async def get_health() -> Response:
    """The process answers."""
    return reply(Health(status="ok", version=__version__), headers={"Cache-Control": "no-store"})


@router.get("/readyz", response_model=Readiness, responses=documented(NotReady))
async def get_readiness(state: State) -> Response:
    """Storage can be written and is, the backend is compiled, the queue has room, and the server is not draining."""
    manager = state.manager
    if reason := _busy(state) or await run_sync(_unusable, state):
        raise NotReady(reason)
    ready = Readiness(
        status="ready",
        backend=manager.backend,
        queued_jobs=manager.queue_depth,
        running_jobs=manager.running,
        longest_stall_s=round(state.stalls.longest_s, 4),
        lost_devices=manager.backends.lost_devices(),
    )
    return reply(ready, headers={"Cache-Control": "no-store"})


def _busy(state: ApiState) -> str | None:
    if state.manager.is_draining:
        return "the server is shutting down"
    if state.manager.is_stuck:
        return "a fault keeps what happens to jobs from being stored: the server's log tells more"
    if not state.manager.is_warm:
        return "the kernels are being compiled, which happens once; jobs are taken already"
    if fault := state.manager.warm_up_fault:
        return fault
    waiting = state.manager.queue_depth
    return f"{waiting} jobs wait, and no more may" if waiting >= state.settings.max_queued_jobs else None


def _unusable(state: ApiState) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=state.settings.data_dir) as file:
            file.write(b"ready?")
            file.flush()
    except OSError as error:
        return f"the data folder cannot be written: {error.strerror}"
    return None
