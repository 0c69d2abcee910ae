"""What receivers of webhooks are sent."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from service.api.schemas.common import Wire
from service.jobs.job import Status
from service.jobs.request import WebhookEvent


class WebhookData(Wire):
    """Whom an event is about; whoever wants to know more asks for the job."""

    job_id: str
    status: Status = Field(description="Of the job, when it happened.")
    batch_id: str | None = None
    batch_index: int | None = Field(default=None, description="The job's place among the batch's items.")


class WebhookMessage(Wire):
    """The body of a webhook, after Standard Webhooks 1.0. All attempts to deliver it have the same."""

    type: WebhookEvent
    timestamp: datetime = Field(description="When it happened.")
    data: WebhookData
