"""docs/scaling.md: its arithmetic is right; deploy/ray says what the code does, and a misspelled field is found."""

import json
import math
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from service.settings import Settings, variable
from tests.ray.cluster import choose_environment
from tests.servers import ROOT, clean_environment

PAGE = (ROOT / "docs" / "scaling.md").read_text()
SHARE = 0.6
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
CHECK = """
import json, sys
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema
from service.hosts.ray import deployment

def check_known(given, taken, path):  # Ray itself drops what it does not know
    if isinstance(given, dict):
        for key in given:
            assert key in taken, f"{path}.{key} is unknown"
            check_known(given[key], taken[key], f"{path}.{key}")
    elif isinstance(given, list):
        for each, its in zip(given, taken, strict=True):
            check_known(each, its, path)

config = json.load(sys.stdin)
check_known(config, ServeDeploySchema.model_validate(config).model_dump(mode="json"), "")
for application in config["applications"]:
    for each in application["deployments"]:
        check_known(each["autoscaling_config"], AutoscalingConfig.model_fields, "autoscaling_config")
print(deployment.name)
"""


def numbers(text: str) -> list[float]:
    """Return the numbers in a cell."""
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", text)]


def table(heading: str) -> list[list[str]]:
    """Return the rows below a table's heading."""
    lines = PAGE[PAGE.index(heading) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_capacity_is_what_the_formula_gives() -> None:
    """Every figure of the table follows from its first two columns."""
    rows = table("| request | µs each")
    assert len(rows) == 4
    for _, cost, size, rate, ten, hundred, million, network in rows:
        per_core = SHARE * 1e6 / numbers(cost)[0]
        assert numbers(rate)[0] == round(per_core)
        for cell, predictions in ((ten, 1e4), (hundred, 1e5), (million, 1e6)):
            assert numbers(cell)[0] == math.ceil(round(predictions / per_core, 1)), (cell, predictions / per_core)
        assert numbers(network)[0] == round(1e6 * sum(numbers(size)) * 8 / 1e9)


def test_files_named_exist() -> None:
    """Every path under deploy/ that the page names is there."""
    named = set(re.findall(r"deploy/[\w./-]*\w", PAGE))
    assert len(named) >= 6
    for path in named:
        assert (ROOT / path).exists(), path


def test_nodes_have_the_environment_that_is_tested() -> None:
    """`deploy/ray/environment` is what the tests' cluster runs with."""
    lines = (ROOT / "deploy" / "ray" / "environment").read_text().splitlines()
    written = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert written.pop("RAY_AUTH_MODE") == "token"  # the tests' cluster is on loopback, and keeps nothing in ~
    assert written.items() <= choose_environment(ROOT).items()


def check(config: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Hold a configuration against Ray's own schema, in a process of its own, and refuse what Ray would drop."""
    return subprocess.run(
        [sys.executable, "-c", CHECK],
        input=json.dumps(config),
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_ray_configuration_is_valid() -> None:
    """Ray accepts it; its settings are the service's; its deployment is the code's."""
    pytest.importorskip("ray", reason="needs '.[ray]'")
    (application,) = CONFIG["applications"]
    (deployment,) = application["deployments"]
    done = check(CONFIG)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == deployment["name"]
    names = {variable(name): name for name in Settings.model_fields}
    Settings.model_validate({names[key]: value for key, value in application["runtime_env"]["env_vars"].items()})
    assert CONFIG["http_options"]["request_timeout_s"] > Settings().request_timeout


@pytest.mark.parametrize("path", [("max_queued_requests",), ("autoscaling_config", "target_ongoing_requests")])
def test_misspelled_field_fails(path: tuple[str, ...]) -> None:
    """A field that Ray does not know is found."""
    pytest.importorskip("ray", reason="needs '.[ray]'")
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    place = config["applications"][0]["deployments"][0]
    for step in path[:-1]:
        place = place[step]
    place[f"{path[-1]}x"] = place.pop(path[-1])
    done = check(config)
    assert done.returncode != 0
    assert f"{path[-1]}x" in done.stderr
