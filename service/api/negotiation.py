"""What the client would rather have: media types by `Accept`, waiting by `Prefer`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from service.api.http_errors import NotAcceptable

MAX_WAIT_S = 60.0
_WAIT = re.compile(r'wait\s*=\s*"?(\d{1,9})"?', re.IGNORECASE)


def choose(accept: str | None, offers: Sequence[str]) -> str:
    """The offer that `Accept` ranks highest, the earlier one where it ranks them alike.

    Raises NotAcceptable when it takes none.
    """
    ranges = _ranges(accept or "*/*")
    ranked = [(_quality(offer, ranges), -index, offer) for index, offer in enumerate(offers)]
    quality, _, best = max(ranked)
    if quality <= 0:
        raise NotAcceptable(f"this answer comes as {', '.join(offers)}; `Accept` takes none of them")
    return best


def wait_of(prefer: str | None) -> float | None:
    """The seconds of `Prefer: wait=N`, at most 60; None where it is not asked for. Other preferences are ignored."""
    for preference in re.split(r"[,;]", prefer or ""):
        if found := _WAIT.fullmatch(preference.strip()):
            return min(float(found[1]), MAX_WAIT_S)
    return None


def _ranges(accept: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for item in accept.split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        found[name] = float(quality) if re.fullmatch(r"[01](\.\d{0,3})?", quality) else 0.0
    return found


def _quality(offer: str, ranges: dict[str, float]) -> float:
    # The most specific range that matches decides.
    for name in (offer, f"{offer.partition('/')[0]}/*", "*/*"):
        if name in ranges:
            return ranges[name]
    return 0.0
