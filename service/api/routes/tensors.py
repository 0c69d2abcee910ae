"""Small tensors in one call: an Arrow IPC stream in, an Arrow IPC stream out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from service import errors
from service.api.dependencies import ARROW_STREAM, State, takes_arrow
from service.api.http_errors import BodyTooLarge, BodyTooSlow, InvalidRequest, UnsupportedMediaType
from service.api.problems import documented
from service.api.replies import bytes_reply
from service.api.state import ApiState
from service.engine.config import BitWidth, Profile, QuantizationConfig, TensorConfig, resolve
from service.engine.schemes.base import GroupSize
from service.engine.table_io import read_table, write_table
from service.engine.tables import Tools, compare_table, dequantize_table, quantize_table

PREFIX = "/v1/tensors:"
router = APIRouter(tags=["tensors"])

#: Calls that wait for their turn, each with a body in memory.
MAX_WAITING = 8
#: Weights may take this much more room than the codes they come from.
MAX_EXPANSION = 4

Work = Callable[[pa.Table, Tools], pa.Table]


def _integer(value: Any) -> Any:
    # A query holds text, and a choice of numbers does not take text for a number.
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class BackendChoice(BaseModel):
    """Where to compute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str = Field(default="auto", description="`auto`, or one of `/v1/backends`.")


class TensorChoice(TensorConfig):
    """How to quantize: the fields of a job's `config` that concern one tensor."""

    bit_width: Annotated[BitWidth | None, BeforeValidator(_integer)] = Field(default=None, description="Bits per code.")
    group_size: Annotated[GroupSize | None, BeforeValidator(_integer)] = Field(
        default=None, description="Elements of a row that share one scale."
    )
    profile: Profile = Profile.LOCAL
    backend: str = Field(default="auto", description="`auto`, or one of `/v1/backends`.")


_BINARY: dict[str, Any] = {ARROW_STREAM: {"schema": {"type": "string", "format": "binary"}}}
_OPERATION: dict[str, Any] = {
    "response_class": Response,
    "dependencies": [Depends(takes_arrow)],
    "responses": {200: {"description": "An Arrow IPC stream.", "content": _BINARY}}
    | documented(
        BodyTooLarge,
        BodyTooSlow,
        UnsupportedMediaType,
        InvalidRequest,
        errors.InvalidConfig,
        errors.InvalidTable,
        errors.NonFiniteWeights,
        errors.QueueFull,
        errors.Draining,
    ),
    "openapi_extra": {"requestBody": {"required": True, "content": _BINARY}},
}


@router.post(f"{PREFIX}quantize", **_OPERATION)
async def quantize_tensors(request: Request, state: State, choice: Annotated[TensorChoice, Query()]) -> Response:
    """Quantize a table of `layer_name`, `weights` (lists of floats) and, if need be, `shape`.

    The answer has a row per layer: `data` holds the codes as one little-endian bit stream, `scales` and
    `zero_points` (a byte each; null where the scheme is symmetric) go row by row and group by group.
    """
    config = await run_sync(_resolved, choice, state)
    return await _answer(request, state, choice.backend, lambda table, tools: quantize_table(table, config, tools))


@router.post(f"{PREFIX}dequantize", **_OPERATION)
async def dequantize_tensors(request: Request, state: State, choice: Annotated[BackendChoice, Query()]) -> Response:
    """From what `quantize` answered back to `layer_name`, `weights` and `shape`."""
    limit = MAX_EXPANSION * state.settings.max_table_bytes
    return await _answer(request, state, choice.backend, lambda table, tools: dequantize_table(table, tools, limit))


@router.post(f"{PREFIX}compare", **_OPERATION)
async def compare_tensors(request: Request, state: State, choice: Annotated[BackendChoice, Query()]) -> Response:
    """How far `other` is from `weights` in a table of `layer_name`, `weights` and `other`."""
    return await _answer(request, state, choice.backend, compare_table)


async def _answer(request: Request, state: ApiState, backend: str, work: Work) -> Response:
    if state.tables.statistics().tasks_waiting >= MAX_WAITING:
        raise errors.QueueFull(f"{MAX_WAITING} tables wait already: try again in a moment")
    body = await _body_of(request)
    stopped = threading.Event()

    def is_over() -> bool:
        return stopped.is_set() or state.closing.is_set()

    def compute() -> memoryview:
        tools = Tools(state.manager.backends.get(backend), state.settings.block_bytes, is_over)
        return write_table(work(read_table(body), tools))

    try:
        content = await run_sync(compute, abandon_on_cancel=True, limiter=state.tables)
    except errors.Cancelled as error:
        raise errors.Draining("the server is shutting down: try again when it is back") from error
    finally:
        # When this call is cancelled the thread stops at its next block.
        stopped.set()
    return bytes_reply(content, ARROW_STREAM)


async def _body_of(request: Request) -> memoryview:
    # Each piece is copied as it comes: to join them in the end would hold everything up, and take them twice.
    declared = request.headers.get("content-length")
    if declared is None:
        grown = bytearray()
        async for chunk in request.stream():
            grown += chunk
        return memoryview(grown)
    # NumPy asks for huge pages, which the kernel clears in a fraction of the time. What does not come takes none.
    body, count = np.empty(int(declared), np.uint8).data, 0
    async for chunk in request.stream():
        body[count : count + len(chunk)] = chunk
        count += len(chunk)
    return body[:count]


def _resolved(choice: TensorChoice, state: ApiState) -> TensorConfig:
    given = choice.model_dump(include=set(TensorConfig.model_fields), exclude_none=True)
    return resolve(choice.profile, [state.settings.config_defaults, QuantizationConfig(**given)])
