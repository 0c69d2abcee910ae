"""Plans: what a job would do, without doing it."""

from __future__ import annotations

import json

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Response

from service import errors
from service.api.auth import Caller
from service.api.dependencies import State, takes_json
from service.api.problems import documented
from service.api.replies import bytes_reply
from service.api.routes.jobs import CREATION_ERRORS
from service.api.schemas.results import Plan
from service.api.state import ApiState
from service.engine.plan import Plan as EnginePlan
from service.jobs.request import QuantizeRequest

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post(
    "",
    response_model=Plan,
    dependencies=[Depends(takes_json)],
    responses=documented(*CREATION_ERRORS, errors.QueueFull, errors.Draining),
)
async def create_plan(body: QuantizeRequest, state: State, caller: Caller) -> Response:
    """A dry run: which tensors become what and why, predicted sizes, memory and time. Nothing is written.

    With `bit_width` auto it reads and measures weights, one call at a time.
    """
    plan = await state.manager.plans.make(body, caller.tenant)
    return bytes_reply(await run_sync(_encode, plan, state))


def _encode(plan: EnginePlan, state: ApiState) -> bytes:
    return json.dumps(state.manager.plans.describe(plan), separators=(",", ":")).encode()
