"""Prometheus scrapes the running service by the configuration that is deployed, and every panel has data."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.compose import engine
from tests.compose.engine import Callers, Project
from tests.servers import ROOT
from tests.wire import wait_until

DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/service.json").read_text())
KEY = "first-key"
STAND_INS = {"$__rate_interval": "30s", "$model": ".+"}


@pytest.fixture(scope="module")
def url(image: str, prometheus_image: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where Prometheus answers, once it has seen some traffic."""
    settings = {"IMAGE": image, "SERVICE_API_KEY": f"{KEY},second-key"} | prometheus_image
    with Project("monitoring", tmp_path_factory.mktemp("project"), **settings) as project:
        project.up("service", "prometheus")
        prometheus, service = project.url("prometheus", 9090), project.url()

        def seen(query: str) -> float:
            requests.get(service + "/v1/models", headers={"X-API-Key": KEY}, timeout=30)  # no predict request
            return value(prometheus, query)

        with Callers(service, count=1, key=KEY):
            wait_until(lambda: seen("sum(rate(service_requests_total[30s])) > 0"), engine.SECONDS)
            wait_until(lambda: seen("sum(rate(service_other_requests_total[30s])) > 0"), engine.SECONDS)
        yield prometheus


def ask(url: str, path: str, **parameters: str) -> Any:
    """Return what Prometheus' API answers."""
    answer = requests.get(f"{url}/api/v1/{path}", params=parameters, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def value(url: str, query: str) -> float:
    """Return the value of a query that gives one, or 0."""
    found = ask(url, "query", query=query)["result"]
    return float(found[0]["value"][1]) if found else 0.0


def queries() -> list[tuple[str, str]]:
    """Return each panel's title and query, with Grafana's variables filled in."""
    found = []
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            for name, text in STAND_INS.items():
                query = query.replace(name, text)
            found.append((panel["title"], query))
    return found


@pytest.mark.parametrize(("title", "query"), queries())
def test_every_panel_has_data(url: str, title: str, query: str) -> None:
    """The query is valid and returns numbers; a model without requests has none."""
    result = ask(url, "query", query=query)["result"]
    assert result, f"{title}: {query}"
    assert any(series["value"][1] != "NaN" for series in result), f"{title}: {result}"


def test_variable_has_the_models(url: str) -> None:
    """The list that the dashboard is filtered by."""
    names = {labels["model"] for labels in ask(url, "series", **{"match[]": "service_model_info"})}
    assert names == {path.name for path in (ROOT / "models").iterdir() if path.is_dir()}


def test_scrapes_with_the_key(url: str) -> None:
    """The target is up although the service asks for a key."""
    (target,) = ask(url, "targets", state="active")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


def test_alerts_are_loaded_and_silent(url: str) -> None:
    """Prometheus took every rule in, and none fires for a healthy service."""
    (group,) = ask(url, "rules")["groups"]
    text = Path(ROOT / "deploy/prometheus/alerts.yml").read_text()
    assert len(group["rules"]) == text.count("- alert: ")
    assert all(rule["health"] in ("ok", "unknown") for rule in group["rules"])
    assert not [alert for alert in ask(url, "alerts")["alerts"] if alert["state"] == "firing"]
