"""The monitor of the event loop notices whoever holds it up."""

from __future__ import annotations

import asyncio
import time

from service.api.stalls import StallMonitor

HELD_UP_S = 0.08


async def test_a_loop_that_is_held_up_is_told_of() -> None:
    monitor, late = StallMonitor(), asyncio.Event()
    delays: list[float] = []

    def observe(delay: float) -> None:
        delays.append(delay)
        late.set()

    monitor.observe = observe
    monitor.start()
    time.sleep(HELD_UP_S)  # noqa: ASYNC251 - it is what is looked for
    await late.wait()
    monitor.stop()
    # It was due to look at the earliest after a quarter of that.
    assert delays[0] >= HELD_UP_S / 2
    assert monitor.longest_s == max(delays)
