"""When a delivery that did not arrive is tried again."""

from __future__ import annotations

import random
from collections.abc import Sequence

#: The schedule of Standard Webhooks: 5 s, 5 min, 30 min, 2, 5, 10, 14, 20 and 24 h, three days in all.
DELAYS_S = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
#: A delay is up to so much longer, so that what failed together does not come back together.
JITTER = 0.2
#: However long a receiver asks to be left alone.
MAX_RETRY_AFTER_S = 86400.0


def delay_s(delays_s: Sequence[float], attempts: int, asked_s: float | None) -> float | None:
    """Seconds to wait after so many attempts; None when there is no other. `asked_s` is what the receiver asked for."""
    if attempts > len(delays_s):
        return None
    return max(delays_s[attempts - 1] * random.uniform(1, 1 + JITTER), min(asked_s or 0.0, MAX_RETRY_AFTER_S))
