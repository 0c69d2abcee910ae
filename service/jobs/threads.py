"""Worker threads that no exit waits for, and their way back to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def run_in_thread(work: Callable[[], T], name: str) -> T:
    """Run a function in a thread of its own: it holds up no exit and leaves nothing behind; raises what that does."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            call_on_loop(loop, _settle, done, done.set_exception, error)
        else:
            call_on_loop(loop, _settle, done, done.set_result, result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await done


def _settle(done: asyncio.Future[T], how: Callable[[Any], None], what: object) -> None:
    if not done.done():
        how(what)


def call_on_loop(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    """As `call_soon_threadsafe`, but says nothing to a loop that is gone: a drain that took too long has ended it."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise
