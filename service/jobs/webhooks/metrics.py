"""What is counted of webhooks, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from service.jobs.webhooks.delivery import DeliveryStatus, Verdict

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60)
#: An attempt whose delivery is still pending is one that is made again.
_OUTCOMES = {DeliveryStatus.DELIVERED: "delivered", DeliveryStatus.PENDING: "retried", DeliveryStatus.FAILED: "failed"}


class WebhookMetrics:
    """Counts attempts to deliver; changed on the event loop."""

    def __init__(self, registry: CollectorRegistry, in_flight: Callable[[], int]) -> None:
        self._attempts = Counter(
            "arrowquant_webhook_attempts",
            "Attempts to deliver, by what followed: `retried` ones are made again.",
            ["outcome"],
            registry=registry,
        )
        self._seconds = Histogram(
            "arrowquant_webhook_attempt_seconds", "How long attempts took.", buckets=_SECONDS, registry=registry
        )
        for outcome in _OUTCOMES.values():
            self._attempts.labels(outcome)
        Gauge("arrowquant_webhook_attempts_open", "Attempts under way.", registry=registry).set_function(in_flight)

    def ended(self, verdict: Verdict, seconds: float) -> None:
        """An attempt has ended, and what follows is stored."""
        self._attempts.labels(_OUTCOMES[verdict.status]).inc()
        self._seconds.observe(seconds)
