"""The KServe manifests: their fields are KServe's, and the service, started as they say, keeps the container contract.

KServe's own schemas are not installed here: its fields are held against the names that its Python SDK 0.21 knows, and
containers and volumes, which are Kubernetes', against the strict schema of a Pod.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import numpy as np
import pytest
import requests
import tritonclient.http as triton
import yaml

from tests import fakes, wire
from tests.deploy.test_kubernetes import VERSION, misspell
from tests.ray.cluster import free_port
from tests.servers import ROOT, START_SECONDS, STOP_SECONDS, clean_environment

FOLDER = ROOT / "deploy" / "kserve"
RUNTIME: dict[str, Any] = yaml.safe_load((FOLDER / "servingruntime.yaml").read_text())
SERVICE: dict[str, Any] = yaml.safe_load((FOLDER / "inferenceservice.yaml").read_text())
(CONTAINER,) = RUNTIME["spec"]["containers"]
RUNTIME_FIELDS = {"annotations", "supportedModelFormats", "protocolVersions", "containers", "volumes"}
FORMAT_FIELDS = {"name", "version", "autoSelect", "priority"}
PREDICTOR_FIELDS = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "containerConcurrency", "model"}
MODEL_FIELDS = {"runtime", "modelFormat", "protocolVersion", "storageUri"}


def check_runtime(runtime: dict[str, Any]) -> None:
    """Check a ServingRuntime: KServe's fields by name, Kubernetes' by schema."""
    assert (runtime["apiVersion"], runtime["kind"]) == ("serving.kserve.io/v1alpha1", "ServingRuntime")
    spec = runtime["spec"]
    assert set(spec) <= RUNTIME_FIELDS
    assert all(set(each) <= FORMAT_FIELDS for each in spec["supportedModelFormats"])
    pod = {"containers": spec["containers"], "volumes": spec["volumes"]}
    content = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
    kubernetes_validate.validate(content, VERSION, strict=True)


def test_runtime_is_valid() -> None:
    """Its fields are known, and one container has the name that KServe looks for."""
    check_runtime(RUNTIME)
    assert CONTAINER["name"] == "kserve-container"


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "protocolVersions"),
        ("spec", "supportedModelFormats", 0, "autoSelect"),
        ("spec", "containers", 0, "readinessProbe", "periodSeconds"),
        ("spec", "containers", 0, "securityContext", "runAsNonRoot"),
    ],
)
def test_misspelled_field_fails(path: tuple[str | int, ...]) -> None:
    """A field that nobody knows is found."""
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        check_runtime(misspell(RUNTIME, *path))


def test_inference_service_asks_for_the_runtime() -> None:
    """Its fields are known; runtime, format and protocol are ones that the ServingRuntime has."""
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = SERVICE["spec"]["predictor"]
    assert set(SERVICE["spec"]) == {"predictor"}
    assert set(predictor) <= PREDICTOR_FIELDS
    model = predictor["model"]
    assert set(model) <= MODEL_FIELDS
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    assert model["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]
    formats = [(each["name"], each["version"]) for each in RUNTIME["spec"]["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the container's own command answers, on the files of one version in a folder that cannot be written."""
    root: Path = tmp_path_factory.mktemp("mnt")
    version = fakes.write_version(root / "from", fakes.compass())
    models = Path(shutil.copytree(version, root / "models"))
    for path in (*models.iterdir(), models):
        path.chmod(0o555 if path.is_dir() else 0o444)
    words = {"{{.Name}}": "winds", "/mnt/models": str(models), "0.0.0.0": "127.0.0.1"}
    arguments = []
    for argument in CONTAINER["args"]:
        for old, new in words.items():
            argument = argument.replace(old, new)  # noqa: PLW2901 - one after the other
        arguments.append(argument)
    port = str(free_port())
    variables = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
    process = subprocess.Popen(
        [sys.executable, "-m", "service", *arguments],
        cwd=ROOT,
        env=clean_environment(variables | {"PORT": port, "SERVICE_DRAIN_DELAY": "0"}),
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert process.poll() is None, "it has ended"
        try:
            return requests.get(address + CONTAINER["readinessProbe"]["httpGet"]["path"], timeout=5).ok
        except requests.ConnectionError:
            return False

    try:
        wire.wait_until(is_ready, START_SECONDS)
        before = sorted(models.iterdir())
        yield address
        assert sorted(models.iterdir()) == before, "it has written beside the model"
    finally:
        process.terminate()
        assert process.wait(STOP_SECONDS) == 0


def test_served_name_is_the_inference_services(url: str) -> None:
    """The model is found by the name of the InferenceService, in both protocols, as Triton's client asks for it."""
    rows = np.array([[2, 1], [-1, 0]], np.float32)
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_model_ready("winds")
        tensor = triton.InferInput("inputs", [2, 2], "FP32")
        tensor.set_data_from_numpy(rows)
        result = client.infer("winds", [tensor])
    np.testing.assert_array_equal(result.as_numpy("outputs"), rows @ fakes.COMPASS_WEIGHTS)
    answer = requests.post(f"{url}/v2/models/winds/infer", json=_tensors(rows), timeout=10).json()
    assert answer["model_name"] == "winds"
    typed = requests.post(f"{url}/v1/models/winds:predict", json={"instances": rows.tolist()}, timeout=10).json()
    assert [each["label"] for each in typed["predictions"]] == ["east", "west"]


def test_probes_have_the_bodies_that_clients_read(url: str) -> None:
    """Health answers JSON, which KServe's own client reads."""
    assert requests.get(f"{url}/v2/health/live", timeout=10).json()["live"] is True
    assert requests.get(f"{url}/v2/health/ready", timeout=10).json()["ready"] is True
    assert requests.get(f"{url}/v1/models/winds", timeout=10).json()["ready"] is True
    path = RUNTIME["spec"]["annotations"]["prometheus.kserve.io/path"]
    assert "service_requests_in_flight" in requests.get(url + path, timeout=10).text


def _tensors(rows: Any) -> dict[str, Any]:
    data = rows.reshape(-1).tolist()
    return {"inputs": [{"name": "inputs", "shape": list(rows.shape), "datatype": "FP32", "data": data}]}
