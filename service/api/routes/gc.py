"""Retention: have what is kept no longer removed now, or see what that would be."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

from fastapi import APIRouter, Depends, Response

from service import errors
from service.api.dependencies import KnownParameters, State, takes_json
from service.api.http_errors import BodyTooLarge, BodyTooSlow, InvalidRequest, MalformedBody, UnsupportedMediaType
from service.api.problems import documented
from service.api.replies import reply
from service.api.schemas.gc import Garbage, GarbageItem, GarbageRequest, GarbageTallies, GarbageTally
from service.jobs.retention import Swept

router = APIRouter(prefix="/v1/gc", tags=["operation"], dependencies=[KnownParameters])


@router.post(
    "",
    response_model=Garbage,
    dependencies=[Depends(takes_json)],
    responses=documented(
        MalformedBody, BodyTooLarge, BodyTooSlow, UnsupportedMediaType, InvalidRequest, errors.NotReady
    ),
)
async def collect_garbage(body: GarbageRequest, state: State) -> Response:
    """Remove what is kept no longer: by the server's settings, and by what the body says in their place.

    Nothing goes that is in use: what a job that has not ended reads, what is being downloaded, an open batch.
    """
    rules = state.settings.retention.overridden(**body.model_dump(exclude={"dry_run"}))
    swept = await state.manager.collector.sweep(rules, datetime.now(UTC), dry_run=body.dry_run)
    return reply(garbage(swept))


def garbage(swept: Swept) -> Garbage:
    """The account of a sweep."""
    tallies = {what.value: GarbageTally(**asdict(tally)) for what, tally in swept.tallies.items()}
    items = [GarbageItem(**asdict(item)) for item in swept.named]
    return Garbage(dry_run=swept.is_dry, removed=GarbageTallies(**tallies), items=items)
