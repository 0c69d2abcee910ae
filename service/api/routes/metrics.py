"""What Prometheus reads."""

from __future__ import annotations

from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from service.api.dependencies import State

router = APIRouter(tags=["health"])

_TEXT = {"schema": {"type": "string"}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "All metrics, in the format that `Accept` asks for.",
        "content": {"text/plain": _TEXT, "application/openmetrics-text": _TEXT},
    }
}


@router.get("/metrics", response_class=Response, responses=_RESPONSES)
async def get_metrics(request: Request, state: State) -> Response:
    """Metrics for Prometheus, as text or as OpenMetrics. Where keys are asked for it takes the scope `admin`."""
    await state.metrics.gather()
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    content = await run_sync(encode, state.metrics.registry)
    return Response(content, headers={"Content-Type": media_type, "Cache-Control": "no-store", "Vary": "Accept"})
