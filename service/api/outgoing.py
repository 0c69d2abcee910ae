"""Calls that this service makes itself, for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Header

from service.api.schemas.webhooks import WebhookMessage


def document(app: FastAPI) -> None:
    """Add the webhook to the application's document."""
    app.webhooks.post(
        "job_event",
        status_code=204,
        responses={
            204: {"description": "It has arrived; any other 2xx says the same."},
            410: {"description": "Nothing more is sent about the job."},
            "default": {"description": "It is sent again later; redirects are not followed."},
        },
        operation_id=receive_job_event.__name__,
        openapi_extra={"security": []},
    )(receive_job_event)


def receive_job_event(
    message: WebhookMessage,
    webhook_id: Annotated[str, Header(description="The same for all attempts of one delivery, and for no other.")],
    webhook_timestamp: Annotated[int, Header(description="Of this attempt, in seconds since 1970.")],
    webhook_signature: Annotated[
        str, Header(description="`v1,` and an HMAC-SHA256 in base64; one for each secret in use, separated by spaces.")
    ],
) -> None:
    """Sent to a job's `webhook` when what it asks for happens.

    Verify the signature with a library of Standard Webhooks and the tenant's secret (`whsec_…`), answer within 15
    seconds, and expect a delivery to come more than once, or later than one of a later event.
    """
