"""A delivery: one event on its way to one receiver; its message, its states, and when it is tried again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from service.jobs.events import Event
from service.jobs.webhooks.retries import delay_s

#: Answered by a receiver that wants no more.
GONE = 410


class DeliveryStatus(StrEnum):
    """Where a delivery stands: waiting for an attempt, or ended. `skipped` is what comes behind a 410."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery as its owner sees it. `id` is the `webhook-id` of all its attempts."""

    id: str
    event: str
    status: DeliveryStatus
    created_at: datetime
    attempts: int
    last_status_code: int | None = None
    last_error: str | None = None
    next_attempt_at: datetime | None = None
    delivered_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Due:
    """A delivery to be tried now. `place` is who answers, as host and port."""

    id: str
    job_id: str
    tenant: str
    place: str
    url: str
    body: bytes
    attempts: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of an attempt. `error` is None for a 2xx, and never holds words of the receiver's."""

    status_code: int | None
    error: str | None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an attempt means: the delivery's next state, and when it is tried again, if it is."""

    status: DeliveryStatus
    answer: Answer
    at: datetime
    next_attempt_at: datetime | None = None

    @property
    def is_gone(self) -> bool:
        """Whether the receiver wants nothing more of the job."""
        return self.answer.status_code == GONE


def judge(answer: Answer, attempts: int, delays_s: Sequence[float]) -> Verdict:
    """What follows from an answer to the attempt of this number, counted from 1; a delay for each retry there is."""
    now = datetime.now(UTC)
    if answer.error is None:
        return Verdict(DeliveryStatus.DELIVERED, answer, now)
    delay = delay_s(delays_s, attempts, answer.retry_after_s)
    if answer.status_code == GONE or delay is None:
        return Verdict(DeliveryStatus.FAILED, answer, now)
    return Verdict(DeliveryStatus.PENDING, answer, now, now + timedelta(seconds=delay))


def message(event: Event, batch_id: str | None, batch_index: int | None) -> str:
    """The body: thin, so that whoever wants more asks with a key. The same for all attempts."""
    data: dict[str, Any] = {"job_id": event.job_id, "status": event.data["status"]}
    if batch_id is not None:
        data |= {"batch_id": batch_id, "batch_index": batch_index}
    fields = {"type": event.type, "timestamp": event.at.isoformat().replace("+00:00", "Z"), "data": data}
    return json.dumps(fields, separators=(",", ":"))
