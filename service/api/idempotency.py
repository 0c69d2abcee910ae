"""`Idempotency-Key`: the same call gets the answer that it got before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

from fastapi import Header, Response
from pydantic import BaseModel

from service.api.replies import JSON
from service.jobs.idempotency import Key, Keys, Once

T = TypeVar("T")

#: Says that the answer is that of an earlier call.
REPLAYED = "Idempotency-Replayed"
#: What of an answer's head is kept.
_KEPT_HEADERS = ("location", "preference-applied")

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern="^[!-~]{1,255}$",
        description="Of your making, such as a UUID. The same key and body get the first answer again, for 24 h.",
    ),
]


def key_of(tenant: str, text: str | None, operation: str, body: BaseModel) -> Key | None:
    """The key of a call, if it has one. Bodies are the same that say the same, in whatever order."""
    if text is None:
        return None
    asked = json.dumps([operation, body.model_dump(mode="json", exclude_unset=True)], sort_keys=True)
    return Key(tenant, text, hashlib.sha256(asked.encode()).hexdigest())


async def answer_once(
    keys: Keys,
    key: Key | None,
    make: Callable[[Once[T] | None], Awaitable[T]],
    respond: Callable[[T], Response],
    wait: Callable[[T], Awaitable[Response]] | None = None,
) -> Response:
    """The answer to a call that makes something, or that of the first call with this key.

    `make` stores with what it makes how `respond` answers; an answer that was waited for replaces it.
    """
    async with keys.claim(key) as known:
        if known is not None:
            return _decode(known)
        made = await make(Once(key, lambda thing: _encode(respond(thing))) if key else None)
        if wait is None:
            return respond(made)
        response = await wait(made)
        if key is not None:
            await keys.replace(key, _encode(response))
        return response


def _encode(response: Response) -> str:
    headers = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
    return json.dumps({"status": response.status_code, "headers": headers, "body": bytes(response.body).decode()})


def _decode(answer: str) -> Response:
    fields = json.loads(answer)
    return Response(fields["body"], fields["status"], fields["headers"] | {REPLAYED: "true"}, JSON)
