"""The Kubernetes manifests: strictly valid, one with another, and with what the service really answers."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings, variable
from tests.servers import ROOT, Server

FOLDER = ROOT / "deploy" / "kubernetes"
BASE = FOLDER / "base"
VERSION = kubernetes_validate.latest_version()
USER = 10001


def read(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file."""
    return list(yaml.safe_load_all(path.read_text()))


def find(kind: str) -> dict[str, Any]:
    """Return the one object of a kind."""
    (found,) = [each for name in RESOURCES for each in read(BASE / name) if each["kind"] == kind]
    return found


KUSTOMIZATION = read(BASE / "kustomization.yaml")[0]
RESOURCES: list[str] = KUSTOMIZATION["resources"]
POD: dict[str, Any] = find("Deployment")["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
LITERALS = dict(line.split("=") for line in KUSTOMIZATION["configMapGenerator"][0]["literals"])


def validate(content: dict[str, Any]) -> None:
    """Check an object against the API's schema, unknown fields refused."""
    kubernetes_validate.validate(content, VERSION, strict=True)


def misspell(content: dict[str, Any], *path: str | int) -> dict[str, Any]:
    """Return a copy with the last field of a path misspelled."""
    copy: dict[str, Any] = yaml.safe_load(yaml.safe_dump(content))
    place: Any = copy
    for step in path[:-1]:
        place = place[step]
    place[f"{path[-1]}x"] = place.pop(path[-1])
    return copy


@pytest.mark.parametrize("name", RESOURCES)
def test_resources_are_valid(name: str) -> None:
    """Every file that the kustomization names holds one valid object; every file there is named."""
    (content,) = read(BASE / name)
    validate(content)
    assert set(RESOURCES) | {"kustomization.yaml"} == {path.name for path in BASE.iterdir()}


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Deployment", ("spec", "template", "spec", "containers", 0, "readinessProbe", "periodSeconds")),
        ("Deployment", ("spec", "template", "spec", "securityContext", "runAsNonRoot")),
        ("HorizontalPodAutoscaler", ("spec", "metrics", 0, "pods", "target", "averageValue")),
        ("NetworkPolicy", ("spec", "ingress", 0, "ports")),
        ("PodDisruptionBudget", ("spec", "maxUnavailable")),
        ("Service", ("spec", "ports", 0, "targetPort")),
    ],
)
def test_misspelled_field_fails(kind: str, path: tuple[str | int, ...]) -> None:
    """A field that Kubernetes does not know is found, however deep it stands."""
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(misspell(find(kind), *path))


@pytest.mark.parametrize("overlay", ["base", "models-from-image"])
def test_kustomize_builds_valid_objects(overlay: str) -> None:
    """What kustomize makes of it is valid too, and the pods have their models."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl, which has kustomize in it")
    built = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / overlay)], capture_output=True, text=True, timeout=60, check=True
    )
    objects = {content["kind"]: content for content in yaml.safe_load_all(built.stdout)}
    for content in objects.values():
        validate(content)
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "model-service:cpu"
    assert pod["containers"][0]["envFrom"][0]["configMapRef"]["name"] == objects["ConfigMap"]["metadata"]["name"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "models"]
    if overlay == "base":
        assert volume["persistentVolumeClaim"] == {
            "claimName": objects["PersistentVolumeClaim"]["metadata"]["name"],
            "readOnly": True,
        }
    else:
        assert "PersistentVolumeClaim" not in objects
        assert pod["initContainers"][0]["volumeMounts"][0]["name"] == "models"


def test_selectors_meet_the_pods() -> None:
    """Service, budget, policy and autoscaler speak of the pods of the deployment."""
    labels = POD["metadata"]["labels"]
    assert find("Service")["spec"]["selector"] == labels
    for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert find(kind)["spec"][field]["matchLabels"] == labels
    assert find("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert find("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == find("Deployment")["metadata"]["name"]


def test_container_is_confined() -> None:
    """It is nobody, has no capabilities, writes only where a volume is; the user is the image's."""
    assert POD["spec"]["securityContext"]["runAsUser"] == USER
    assert POD["spec"]["securityContext"]["runAsNonRoot"] is True
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"USER {USER}" in dockerfile
    assert set(CONTAINER["resources"]) == {"requests", "limits"}


def test_settings_are_settings() -> None:
    """Every variable is one of the service's, its value is accepted, and the pod lives long enough to drain."""
    names = {variable(name): name for name in Settings.model_fields}
    settings = Settings.model_validate({names[key]: value for key, value in LITERALS.items()})
    assert all(entry["name"] in names for entry in CONTAINER["env"])
    assert settings.drain_delay + settings.shutdown_grace < POD["spec"]["terminationGracePeriodSeconds"]
    assert settings.port == CONTAINER["ports"][0]["containerPort"]
    mounted = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert {str(settings.models_dir), "/tmp"} == mounted
    period = CONTAINER["readinessProbe"]["periodSeconds"] * CONTAINER["readinessProbe"]["failureThreshold"]
    assert period < settings.drain_delay, "requests would come after the end of listening"


def test_probes_and_figures_are_answered(server: Server) -> None:
    """Probe paths answer 200; the autoscaler's figures are ones that /metrics has and the adapter brings."""
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server.get(CONTAINER[probe]["httpGet"]["path"]).status_code == 200
    annotations = POD["metadata"]["annotations"]
    figures = server.get(annotations["prometheus.io/path"]).text
    (adapter,) = read(FOLDER / "prometheus-adapter.yaml")
    for metric in find("HorizontalPodAutoscaler")["spec"]["metrics"]:
        name = metric["pods"]["metric"]["name"]
        assert f"# TYPE {name} gauge" in figures
        assert name in adapter["rules"]["custom"][0]["seriesQuery"]
