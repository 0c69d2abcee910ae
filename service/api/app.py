"""The application: lifespan, middleware, routers. No logic."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from service import __version__
from service.api import openapi, outgoing, problems
from service.api.authentication import Authentication
from service.api.hosts import Hosts
from service.api.key_ring import KeyRing
from service.api.middleware import BodyLimit, BodyPace, Head, OneLength, RequestId
from service.api.observation import Observation
from service.api.routes import artifacts, batches, catalog, events, gc, health, jobs, plans, reports, tensors, uploads
from service.api.routes import metrics as metrics_route
from service.api.routes import problems as problem_pages
from service.api.state import ApiState
from service.api.targets import Target
from service.api.tracing import make_tracing
from service.jobs.blobs import BlobLimits
from service.jobs.manager import JobManager
from service.jobs.quotas import Limits
from service.jobs.watch import Watch
from service.jobs.webhooks.addresses import Reach
from service.jobs.webhooks.webhooks import WebhookOptions
from service.settings import Settings
from service.storage.stores import Stores

ROUTERS = (
    jobs.router,
    batches.router,
    events.router,
    reports.router,
    artifacts.router,
    plans.router,
    uploads.router,
    tensors.router,
    catalog.router,
    gc.router,
    health.router,
    metrics_route.router,
    problem_pages.router,
)


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application; its state is at `app.state.api` while it runs."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tracing = make_tracing(os.environ)
        state = ApiState(settings, _manager(settings, Watch(tracing.jobs if tracing else None)), tracing)
        app.state.api = state
        await state.manager.start()
        if settings.asks_for_keys:
            await keys.open()
        state.stalls.start()
        yield
        state.stalls.stop()
        # The server has done so already, unless another one runs this application.
        if not state.manager.is_draining:
            await state.drain()
        keys.close()
        if tracing is not None:
            await tracing.close()

    keys = KeyRing(settings.data_dir)
    app = FastAPI(
        title="ArrowQuant Service",
        summary="Quantizes model weights and reports what it cost.",
        version=__version__,
        lifespan=lifespan,
        # The pages that come with the framework load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # An address with a slash too many is nothing here, like any other.
        redirect_slashes=False,
        separate_input_output_schemas=False,
        generate_unique_id_function=lambda route: route.name,
        responses=problems.DEFAULT_RESPONSES,
    )
    problems.install(app)
    app.add_middleware(Head, own=uploads.PREFIX)
    limits = {
        tensors.PREFIX: settings.max_table_bytes,
        uploads.PREFIX: settings.max_blob_bytes,
        "": settings.max_body_bytes,
    }
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(OneLength)
    app.add_middleware(BodyPace, own=uploads.PREFIX, timeout_s=settings.body_timeout_s)
    if settings.asks_for_keys:
        app.add_middleware(Authentication, keys=keys, defaults=_tenant_limits(settings))
    elif settings.is_loopback:
        app.add_middleware(Hosts, allowed=settings.allowed_hosts)
    app.state.routes = [route for router in ROUTERS for route in router.routes]
    app.add_middleware(Target, routes=app.state.routes)
    level = logging.INFO if settings.log_format == "json" else logging.DEBUG
    app.add_middleware(Observation, routes=app.state.routes, level=level)
    app.add_middleware(RequestId)
    for router in ROUTERS:
        app.include_router(router)
    outgoing.document(app)
    openapi.install(app, asks_for_keys=settings.asks_for_keys)
    return app


def _tenant_limits(settings: Settings) -> Limits:
    return Limits(settings.max_open_jobs, settings.max_stored_bytes, settings.requests_per_minute)


def _manager(settings: Settings, watch: Watch) -> JobManager:
    return JobManager(
        data_dir=settings.data_dir,
        model_roots=settings.model_roots,
        stores=Stores(settings.stores),
        block_bytes=settings.block_bytes,
        threads=settings.threads,
        max_running_jobs=settings.max_running_jobs,
        device_lanes=settings.device_lanes,
        device_memory_bytes=settings.device_memory_bytes,
        memory_limit_bytes=settings.memory_limit_bytes,
        max_queued_jobs=settings.max_queued_jobs,
        kept_places=settings.kept_places,
        config_defaults=settings.config_defaults,
        tenant_limits=_tenant_limits(settings),
        blob_limits=BlobLimits(settings.max_blob_bytes, settings.max_stored_bytes),
        retention=settings.retention,
        webhooks=WebhookOptions(
            Reach(settings.webhook_allowed_networks, settings.webhook_allow_http),
            settings.webhook_ca_file,
            settings.webhook_timeout_s,
            settings.webhook_retry_delays_s,
        ),
        silence_s=settings.stream_silence_s,
        reader_limit=settings.max_unread_events,
        watch=watch,
    )
