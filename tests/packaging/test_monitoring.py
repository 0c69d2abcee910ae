"""What deploy/ gives to Prometheus and Grafana speaks of metrics that there are, in queries that can be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from service.jobs.api_keys import Scope
from tests.api.keyed import Keyed
from tests.api.scraping import scrape_openmetrics
from tests.server import Server

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "arrowquant.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = sorted({target["expr"] for panel in PANELS for target in panel["targets"]} | {rule["expr"] for rule in RULES})
#: What Prometheus itself keeps of each target.
OF_PROMETHEUS = {"up"}
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}


def parsed(query: str) -> promql_parser.Expr:
    """A query as Prometheus reads it, Grafana's interval replaced."""
    return promql_parser.parse(query.replace("$__rate_interval", "1m"))


def selectors(node: Any) -> Iterator[Any]:
    """Every selector of a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "param", "vector_selector")]
    for child in [*children, *(getattr(node, "args", None) or ())]:
        if child is not None:
            yield from selectors(child)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, model_root: Path) -> set[str]:
    """The names of all samples that a server with keys may show."""
    keyed = Keyed(Server(tmp_path_factory.mktemp("monitored") / "data", [model_root], require_keys=True))
    families = scrape_openmetrics(keyed.client("operators", Scope.ADMIN)).families.values()
    keyed.stop()
    return {family.name + suffix for family in families for suffix in SUFFIXES.get(family.type, [""])}


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_can_be_read_and_names_a_metric_that_there_is(query: str, known: set[str]) -> None:
    found = [selector.name for selector in selectors(parsed(query))]
    assert found, "a query selects something"
    assert set(found) <= known | OF_PROMETHEUS


def test_every_panel_is_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        covered = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in
                   range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & covered, f"{panel['title']} lies on another"
        assert place["x"] + place["w"] <= 24
        cells |= covered
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["legendFormat"] for target in panel["targets"])
    [variable] = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")


def test_every_alert_says_how_bad_it_is_and_what_it_means() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")


def test_the_compose_profile_puts_the_files_where_they_are_looked_for() -> None:
    prometheus, grafana = SERVICES["prometheus"], SERVICES["grafana"]
    for service in (prometheus, grafana):
        assert service["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "reachable from this machine only"
        assert ":-" in service["image"].partition(":")[2], "a version that can be chosen"
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            assert not source.startswith(".") or (ROOT / source).is_dir(), volume
            assert not source.startswith(".") or volume.endswith(":ro"), volume
            assert target.startswith("/")
    assert PROMETHEUS["rule_files"] == ["alerts.yml"]
    [scraped] = PROMETHEUS["scrape_configs"]
    [found] = scraped["dns_sd_configs"]
    assert set(found["names"]) <= SERVICES.keys()
    assert all(port.endswith(f":{found['port']}") for name in found["names"] for port in SERVICES[name]["ports"])
    [source] = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["uid"] == DASHBOARD["templating"]["list"][0]["current"]["value"]
    [provider] = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/arrowquant.yml").read_text())["providers"]
    folder = provider["options"]["path"]
    assert f"./deploy/grafana/dashboards:{folder}:ro" in grafana["volumes"]
    for way_in in ("GF_AUTH_BASIC_ENABLED", "GF_AUTH_DISABLE_LOGIN_FORM"):
        # Its first user is admin, with the password admin.
        assert (grafana["environment"][way_in] == "true") is ("DISABLE" in way_in)
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/arrowquant.json"
