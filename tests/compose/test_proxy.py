"""Several replicas behind one port: calls go to all that are ready, and none fails when one goes away."""

from collections.abc import Iterator

import pytest
import requests

from tests.compose import engine
from tests.compose.engine import Callers, Project
from tests.wire import wait_until


@pytest.fixture(scope="module")
def project(image: str, proxy_image: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Two replicas and the proxy."""
    settings = {"IMAGE": image, "CPUS": "1", "SERVICE_DRAIN_DELAY": "3"} | proxy_image
    with Project("proxy", tmp_path_factory.mktemp("project"), **settings) as running:
        running.up("service", "proxy", scale=2)
        yield running


def answered(project: Project, index: int) -> float:
    """Return how many predict requests a replica has answered."""
    lines = requests.get(project.url(index=index) + "/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("service_requests_total{"))


def test_both_replicas_answer(project: Project) -> None:
    """One port, and both get calls."""
    before = [answered(project, index) for index in (1, 2)]
    with Callers(project.url("proxy", 8080)) as callers:
        wait_until(lambda: all(answered(project, index) > before[index - 1] + 20 for index in (1, 2)), engine.SECONDS)
    assert not callers.failures


def test_loading_is_refused(project: Project) -> None:
    """It would reach one replica of several; the answer says so, as every failure of the service does."""
    answer = requests.post(project.url("proxy", 8080) + "/v2/repository/models/linear/unload", json={}, timeout=30)
    assert answer.status_code == 403
    assert "several replicas" in answer.json()["error"]


def test_killed_replica_costs_nothing(project: Project) -> None:
    """Kill -9 of one: what it was working on is asked of the other, and it takes part again when it is back."""
    with Callers(project.url("proxy", 8080)) as callers:
        wait_until(lambda: len(callers.answers) > 50)
        project.kill_main_process(index=2)
        before = len(callers.answers)
        wait_until(lambda: len(callers.answers) > before + 100, engine.SECONDS)
        wait_until(lambda: project.health(index=2) == "healthy", engine.SECONDS)
        wait_until(lambda: answered(project, 2) > 20, engine.SECONDS)
    assert not callers.failures
    print(f"{len(callers.answers)} calls while a replica was killed and came back, none failed")


def test_scaled_under_load(project: Project) -> None:
    """From two to one and back: a replica that is stopped drains, and one that is started is found."""
    with Callers(project.url("proxy", 8080)) as callers:
        wait_until(lambda: len(callers.answers) > 50)
        project.up("service", "proxy", scale=1)
        before = len(callers.answers)
        wait_until(lambda: len(callers.answers) > before + 50, engine.SECONDS)
        project.up("service", "proxy", scale=2)
        wait_until(lambda: answered(project, 2) > 20, engine.SECONDS)
    assert not callers.failures
    print(f"{len(callers.answers)} calls while scaled from two to one to two, none failed")
