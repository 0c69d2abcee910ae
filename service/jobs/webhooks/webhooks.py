"""All of webhooks that the manager knows: checks them when a job comes, delivers, and tells what was delivered."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry

from service.errors import WebhookSecretMissing
from service.jobs.database import Database
from service.jobs.sources import pointing
from service.jobs.submission import Submission
from service.jobs.webhooks import delivery_table, secret_table
from service.jobs.webhooks.addresses import Endpoint, Reach, parse
from service.jobs.webhooks.deliverer import Deliverer
from service.jobs.webhooks.delivery import Delivery
from service.jobs.webhooks.resolver import Resolver
from service.jobs.webhooks.retries import DELAYS_S

#: Shown of a job; it has more only when the server was restarted often under it.
SHOWN = 20
#: An attempt that a drain may wait for; longer ones are made again.
GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class WebhookOptions:
    """What an operator can set. `timeout_s` is of an attempt, `delays_s` are between attempts."""

    reach: Reach = field(default_factory=Reach)
    ca_file: Path | None = None
    timeout_s: float = 15.0
    delays_s: tuple[float, ...] = DELAYS_S


class Webhooks:
    """The webhooks of one data folder; everything on the event loop."""

    def __init__(self, database: Database, options: WebhookOptions, registry: CollectorRegistry) -> None:
        """Counts on `registry`; raises InvalidConfig when the certificates cannot be read."""
        # It loads an HTTP client, which takes as long as a tenth of everything else.
        from service.jobs.webhooks.sender import Sender

        self._database = database
        self._reach = options.reach
        # Two, so that names which are looked up without end when jobs are made do not hold up what is delivered.
        self._resolver = Resolver(options.reach)
        sender = Sender(options.reach, Resolver(options.reach), timeout_s=options.timeout_s, ca_file=options.ca_file)
        #: What delivers.
        self.deliverer = Deliverer(database, sender, options.delays_s, registry)

    async def check(self, submission: Submission) -> None:
        """Raise unless each webhook may be told of its job: WebhookRefused, WebhookSecretMissing or LookupsBusy.

        The error points at the webhook.
        """
        asked = [
            (index, request.webhook) for index, request in enumerate(submission.requests) if request.webhook is not None
        ]
        if not asked:
            return
        endpoints: dict[str, tuple[int, Endpoint]] = {}
        for index, webhook in asked:
            with submission.at(index), pointing("/webhook/url"):
                endpoint = parse(webhook.url, self._reach)
            endpoints.setdefault(endpoint.host, (index, endpoint))
        with submission.at(asked[0][0]), pointing("/webhook"):
            await self._check_secret(submission.tenant)
        checks = [self._check_host(submission, *found) for found in endpoints.values()]
        # All of them to the end: of several that fail the first one is told.
        refused = await asyncio.gather(*checks, return_exceptions=True)
        for error in filter(None, refused):
            raise error

    async def deliveries(self, job_id: str) -> list[Delivery]:
        """The newest deliveries of a job, oldest first."""
        return await self._database.read(lambda db: delivery_table.of_job(db, job_id, SHOWN))

    async def _check_secret(self, tenant: str) -> None:
        if not await self._database.read(lambda db: secret_table.usable(db, tenant)):
            raise WebhookSecretMissing(
                f"tenant {tenant} has no signing secret, so its receivers could not tell this server from a "
                f"stranger: the operator makes one with `arrowquant webhooks secret create --tenant {tenant}`"
            )

    async def _check_host(self, submission: Submission, index: int, endpoint: Endpoint) -> None:
        with submission.at(index), pointing("/webhook/url"):
            await self._resolver.resolve(endpoint.host, endpoint.port, submission.tenant)
