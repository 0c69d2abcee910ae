"""Runs the application with uvicorn, so that a signal drains it first."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from contextlib import closing
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.api.app import create_app
from service.api.connections import ConnectionLimits, bounded
from service.api.state import ApiState
from service.errors import InvalidConfig
from service.jobs.api_keys import ApiKeys
from service.jobs.memory import limit_arenas
from service.jobs.store import DATABASE, note_address
from service.logs import configure
from service.settings import Settings

log = logging.getLogger(__name__)

#: How long answers that are under way may take once the jobs have stopped; then their connections are cut.
GRACE_S = 0.3
#: What goes on without its connection is cancelled then; uvicorn takes whole seconds.
CANCEL_S = 1
BACKLOG = 2048


def serve(settings: Settings) -> None:
    """Serve until a signal comes.

    Raises InvalidConfig when the address may not or cannot be listened on, and what keeps the jobs
    from starting, such as StorageFailure when another server holds the data folder.
    """
    configure(settings.log_level, settings.log_format)
    limit_arenas()
    _check_keys(settings)
    listening = _listen(settings)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        # Entered below, where its errors reach the caller instead of the log.
        lifespan="off",
        log_config=None,
        # The application writes lines of its own, with ids and without queries.
        access_log=False,
        server_header=False,
        http=bounded(_connection_limits(settings)),
        timeout_graceful_shutdown=CANCEL_S,
        ws="none",
    )
    with closing(listening), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(app, DrainingServer(config), listening))


def _connection_limits(settings: Settings) -> ConnectionLimits:
    limits = ConnectionLimits(settings.max_connections, settings.head_timeout_s, settings.unread_timeout_s)
    return limits.within_descriptors()


async def _serve(app: FastAPI, server: DrainingServer, listening: socket.socket) -> None:
    async with app.router.lifespan_context(app):
        await server.serve([listening])


class DrainingServer(uvicorn.Server):
    """Drains the jobs and ends the event streams at the signal; uvicorn alone would wait for the streams."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, and then says where it listens."""
        await super().startup(sockets)
        state: ApiState = self.config.app.state.api  # type: ignore[union-attr]
        for listening in sockets or []:
            log.info("listening on %s", _url(listening))
            # For commands that work on the data folder beside this process.
            note_address(state.settings.data_dir, _url(listening))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Exit, at once when asked a second time; not kept to be raised again, so the process ends with 0."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain while calls are still answered, then close the connections."""
        state: ApiState = self.config.app.state.api  # type: ignore[union-attr]
        log.info("draining")
        draining = asyncio.create_task(state.drain())
        while not draining.done() and not self.force_exit:
            await asyncio.wait({draining}, timeout=0.1)
        asyncio.get_running_loop().call_later(GRACE_S, self._cut_connections)
        await super().shutdown(sockets)

    def _cut_connections(self) -> None:
        # Streams and half-sent bodies then end as when a client hangs up, without a word in the log.
        for connection in tuple(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def _check_keys(settings: Settings) -> None:
    if not settings.asks_for_keys:
        return
    _check_roots(settings)
    if _has_keys(settings.data_dir):
        return
    if settings.is_loopback:
        log.warning("no API key is usable, so every call is refused: `arrowquant keys create` makes one")
        return
    raise InvalidConfig(
        f"{settings.host} can be reached from other machines, and {settings.data_dir} has no usable API key: make one "
        "with `arrowquant keys create`, or listen on 127.0.0.1, or set ARROWQUANT_ALLOW_UNAUTHENTICATED=true where "
        "something else keeps strangers out"
    )


def _check_roots(settings: Settings) -> None:
    """Tenants share the model roots: what is in one is anybody's."""
    data_dir = settings.data_dir.resolve()
    for root in (root.resolve() for root in settings.model_roots):
        if data_dir.is_relative_to(root) or root.is_relative_to(data_dir):
            raise InvalidConfig(
                f"the data folder {data_dir} and the model root {root} hold one another, so that any tenant could read "
                "all others' files: take folders apart from each other"
            )


def _has_keys(data_dir: Path) -> bool:
    if not (data_dir / DATABASE).exists():
        return False
    with ApiKeys(data_dir) as keys:
        return keys.has_usable()


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol has to be named: asyncio switches Nagle's delay off only where it sees TCP.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise InvalidConfig(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
