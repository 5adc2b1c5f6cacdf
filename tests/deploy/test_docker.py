"""The files that deploy the service agree with each other and with the service; `tests/compose` runs them."""

import json
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings, variable
from service.telemetry import metrics
from tests.servers import ROOT

COMPOSE = (ROOT / "docker-compose.yml").read_text()
GPU_COMPOSE = (ROOT / "docker-compose.gpu.yml").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
FIXED = {"host", "port", "models_dir"}  # by the image
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/service.json").read_text())


def run(*command: str) -> None:
    """Run a checker that may not be installed here."""
    program = shutil.which(command[0], path=f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def variables() -> dict[str, str]:
    """Return each variable that docker-compose.yml reads and its default there, "" where it is only passed on."""
    found = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE))
    return dict.fromkeys(re.findall(r"^      (SERVICE_\w+):$", COMPOSE, re.MULTILINE), "") | found


def test_every_setting_can_be_set() -> None:
    """The compose file passes on each setting that the image has not fixed."""
    wanted = {variable(name) for name in Settings.model_fields if name not in FIXED}
    assert {name for name in variables() if name.startswith("SERVICE_")} == wanted


def test_example_documents_every_variable() -> None:
    """`.env.example` has each variable once, commented out, with the default that holds without it."""
    shown = dict(re.findall(r"^#(\w+)=(.*)$", EXAMPLE, re.MULTILINE))
    assert len(re.findall(r"^#\w+=", EXAMPLE, re.MULTILINE)) == len(shown)
    expected = variables()
    for name, field in Settings.model_fields.items():
        if not expected.get(variable(name), "-"):
            expected[variable(name)] = "" if field.default is None else str(field.default)
    assert shown == expected


def test_stop_grace_is_enough() -> None:
    """Docker waits longer for the end than the service may take."""
    found = variables()
    longest = float(found["SERVICE_DRAIN_DELAY"]) + float(found["SERVICE_SHUTDOWN_GRACE"])
    assert float(found["STOP_GRACE_PERIOD"].removesuffix("s")) > longest + 2


def test_gpu_has_the_whole_machine() -> None:
    """On a GPU's machine, what limits the service on a small one is lifted unless it was set."""
    limits = dict(re.findall(r"^    (cpus|mem_limit|pids_limit): (\S+)$", GPU_COMPOSE, re.MULTILINE))
    assert limits == {"cpus": "${CPUS:-0}", "mem_limit": "${MEMORY:-0}", "pids_limit": "-1"}
    assert set(re.findall(r"\$\{(\w+):-", GPU_COMPOSE)) <= set(variables())


def read_requirements(name: str = "dependencies") -> list[str]:
    """Return the names of the packages that pyproject.toml asks for, by itself or in an extra."""
    listed = re.search(rf"^{name} = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    return [each for each in re.findall(r'"([\w-]+)', listed[1]) if each != "model-service"]


LOCKS = {path.name: path.read_text() for path in (ROOT / "deploy").glob("*.lock")}


def test_locks_have_every_dependency() -> None:
    """What pyproject.toml asks for is pinned, and packages in several locks are the same version in each."""
    extras = {"requirements-torch.lock": ["torch"], "requirements-train.lock": ["torch", "train"]}
    pinned: dict[str, set[str]] = {}
    for lock, text in LOCKS.items():
        versions = dict(re.findall(r"^([\w-]+)==(\S+)", text, re.MULTILINE))
        wanted = read_requirements() + [name for extra in extras.get(lock, []) for name in read_requirements(extra)]
        for name in wanted:
            found = "onnxruntime-gpu" if (name, lock) == ("onnxruntime", "requirements-gpu.lock") else name
            assert found in versions, (name, lock)
        for name, version in versions.items():
            pinned.setdefault(name, set()).add(version)
    assert "onnxruntime==" not in LOCKS["requirements-gpu.lock"]
    assert {name: versions for name, versions in pinned.items() if len(versions) > 1} == {}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_of_an_image_has_its_hash(lock: str) -> None:
    """Nothing is installed whose digest is not locked."""
    packages = re.split(r"^(?=[\w-]+==)", re.sub(r"^#.*\n", "", LOCKS[lock], flags=re.MULTILINE), flags=re.MULTILINE)
    for package in filter(None, packages):
        assert re.fullmatch(r"[\w-]+==\S+( ;[^\\\n]*)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n", package), package[:80]
    assert lock in DOCKERFILE
    for line in re.findall(r"pip .* install .*", DOCKERFILE):
        assert "install --require-hashes -r requirements" in line


def test_health_check_is_the_images() -> None:
    """The compose file asks what the image asks."""
    command = '["CMD", "python", "-IS", "/app/healthcheck.py"]'
    assert f"test: {command}" in COMPOSE
    assert command.replace('"CMD", ', "") in DOCKERFILE


def panels() -> list[dict[str, Any]]:
    """Return the dashboard's panels."""
    return list(DASHBOARD["panels"])


def test_dashboard_is_laid_out() -> None:
    """Panels have ids of their own, lie within the grid, and none lies on another."""
    assert len({panel["id"] for panel in panels()}) == len(panels())
    for panel in panels():
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in panels()), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above


def test_dashboard_uses_the_provisioned_source() -> None:
    """Every panel reads from the data source that is provisioned."""
    source = (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    assert {panel["datasource"]["uid"] for panel in panels()} == set(re.findall(r"uid: (\S+)", source))


@pytest.mark.parametrize("file", ["grafana/dashboards/service.json", "prometheus/alerts.yml"])
def test_queries_name_real_metrics(file: str) -> None:
    """Each metric that is asked for is one that the service has."""
    families = set(re.findall(r'"(service_\w+)"', Path(metrics.__file__).read_text()))
    used = set(
        re.findall(
            r"\b(service_[a-z_]+?)(?:_total|_bucket|_sum|_count)?\b(?=[\[{ )])", (ROOT / "deploy" / file).read_text()
        )
    )
    assert used
    assert used <= families


def test_dockerfile_is_clean() -> None:
    """Hadolint has nothing to say."""
    run("hadolint", "Dockerfile")


def test_alerts_fire_when_they_should() -> None:
    """Prometheus' own tool accepts the rules, and its tests of them pass."""
    run("promtool", "check", "config", "--syntax-only", "deploy/prometheus/prometheus.yml")
    run("promtool", "test", "rules", "deploy/prometheus/alerts_test.yml")


def test_proxy_accepts_its_configuration() -> None:
    """HAProxy finds no fault with the file."""
    run("haproxy", "-c", "-f", "deploy/haproxy/haproxy.cfg")
