"""What `/metrics` says, read by the library that Prometheus's own clients are made of."""

from __future__ import annotations

from collections.abc import Iterable

import httpx
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Scrape:
    """One scrape: the families, and their samples by name and labels."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = {family.name: family for family in families}
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """A sample; 0 when it is not there, as for a counter that has counted nothing."""
        return self._samples.get((name, frozenset(labels.items())), 0.0)

    def labels(self, name: str) -> list[dict[str, str]]:
        """The labels of all samples of this name."""
        return [dict(labels) for sample, labels in self._samples if sample == name]

    @property
    def names(self) -> set[str]:
        """The names of all samples."""
        return {name for name, _ in self._samples}


def scrape(client: httpx.Client) -> Scrape:
    """Scrape as text."""
    return Scrape(text_string_to_metric_families(_text(client, "text/plain")))


def scrape_openmetrics(client: httpx.Client) -> Scrape:
    """Scrape as OpenMetrics, whose parser is strict."""
    return Scrape(openmetrics.text_string_to_metric_families(_text(client, OPENMETRICS)))


def _text(client: httpx.Client, accept: str) -> str:
    response = client.get("/metrics", headers={"Accept": accept})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith(accept.partition(";")[0])
    return response.text
