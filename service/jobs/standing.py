"""Tasks that go on as long as the server: what stops one is logged, and the task begun again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)

#: From a fault to the next beginning, so that one which stays does not fill the log.
RESTART_S = 5.0


class StandingTask:
    """Keeps a coroutine function running; made and used on the event loop."""

    def __init__(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """`work` never ends by itself; called again after a fault, it goes on with what is left to do."""
        self._name = name
        self._work = work
        self._begin()

    @property
    def is_down(self) -> bool:
        """Whether it was stopped by a fault, and is not yet begun again."""
        return self._restart is not None

    async def stop(self) -> None:
        """End it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._restart is not None:
            self._restart.cancel()

    def _begin(self) -> None:
        self._restart: asyncio.TimerHandle | None = None
        self._task = asyncio.create_task(self._work(), name=self._name)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        logger.error("%s: a fault, begun again in %g s", self._name, RESTART_S, exc_info=task.exception())
        self._restart = asyncio.get_running_loop().call_later(RESTART_S, self._begin)
