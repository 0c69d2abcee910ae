"""What this server can do: profiles, schemes, methods, formats and backends, from the registries."""

from __future__ import annotations

import inspect
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Response
from pydantic import BaseModel

from service.api.dependencies import KnownParameters, State
from service.api.http_errors import InvalidRequest
from service.api.problems import documented
from service.api.replies import reply
from service.api.schemas.catalog import (
    BackendInfo,
    BackendList,
    FormatInfo,
    FormatList,
    MethodInfo,
    MethodList,
    ProfileInfo,
    ProfileList,
    SchemeInfo,
    SchemeList,
)
from service.engine.backends.registry import backends, choose_backend
from service.engine.config import Profile, resolve
from service.engine.formats.registry import formats
from service.engine.methods.registry import methods
from service.engine.schemes.registry import schemes

router = APIRouter(prefix="/v1", tags=["catalog"], dependencies=[KnownParameters], responses=documented(InvalidRequest))


@router.get("/profiles", response_model=ProfileList)
async def list_profiles(state: State) -> Response:
    """The sets of defaults, as they hold on this server."""
    defaults = state.settings.config_defaults
    data = [ProfileInfo(id=profile, config=resolve(profile, [defaults])) for profile in Profile]
    return reply(ProfileList(data=data))


@router.get("/schemes", response_model=SchemeList)
async def list_schemes() -> Response:
    """What numbers can become."""
    data = [
        SchemeInfo(id=id_, description=_summary(cls), bits=cls.ids[id_], parameters=_schema(cls))
        for id_, cls in schemes().items()
    ]
    return reply(SchemeList(data=data))


@router.get("/methods", response_model=MethodList)
async def list_methods() -> Response:
    """The ways to find scales."""
    data = [MethodInfo(id=id_, description=_summary(cls), parameters=_schema(cls)) for id_, cls in methods().items()]
    return reply(MethodList(data=data))


@router.get("/formats", response_model=FormatList)
async def list_formats() -> Response:
    """How models can be read and written."""
    data = [
        FormatInfo(
            id=id_,
            description=cls.description,
            can_read=cls.can_read,
            can_write=cls.can_write,
            options=_schema(cls.options),
        )
        for id_, cls in formats().items()
    ]
    return reply(FormatList(data=data))


@router.get("/backends", response_model=BackendList)
async def list_backends() -> Response:
    """Where this server can compute, and why it cannot elsewhere."""
    return reply(BackendList(data=await run_sync(_backends)))


def _backends() -> list[BackendInfo]:
    preferred = choose_backend("auto")
    reasons = {id_: cls.unavailable() for id_, cls in backends().items()}
    return [
        BackendInfo(
            id=id_,
            description=cls.description,
            available=reasons[id_] is None,
            reason=reasons[id_],
            preferred=id_ == preferred,
        )
        for id_, cls in backends().items()
    ]


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0]
