"""The models that the registry ships, served over real HTTP by both backends, against the eager net."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from service.model import postprocess
from service.model.backends import Array
from service.model.manifest import Manifest
from service.model.predictor import worst_excess
from service.model.version_folder import load_manifest
from tests.servers import ROOT, Server, run_service
from training.nets import DigitsCnn, DigitsNet, LinearNet, ServingNet, fold_norms
from training.recipes import RECIPES

VERSIONS = sorted((ROOT / "models").glob("*/*/manifest.json"))
IDS = [f"{path.parent.parent.name}/{path.parent.name}" for path in VERSIONS]
DIGITS = [path for path in VERSIONS if path.parent.parent.name.startswith("mnist")]
ROWS, ROWS_AT_ONCE = 1000, 250
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module", params=["onnx", "torchscript"])
def serving(request: pytest.FixtureRequest, published: Path) -> Iterator[Server]:
    """A server on the shipped models, by one backend and then by the other."""
    with Server(published, "--workers", "1", "--device", "cpu", "--backend", request.param) as running:
        yield running


def build_eager(manifest: Manifest, folder: Path) -> ServingNet:
    """Return the eager net with the parameters of the ONNX file, which keep their names from the net."""
    graph = onnx.load(folder / manifest.artifacts["onnx"].file).graph
    state = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    state = {name: each for name, each in state.items() if each.is_floating_point()}  # the rest are shapes
    serving_net = ServingNet(build_net(manifest, state), manifest.task).eval()
    missing, unexpected = serving_net.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"net.0.deviation"}  # where it is 1, the exporter drops it
    return serving_net


def build_net(manifest: Manifest, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return a net of the architecture that parameters of these names and shapes belong to."""
    if manifest.input.kind == "tabular":
        return LinearNet(manifest.input.shape[0])
    if any(each.ndim == 4 for each in state.values()):
        return fold_norms(DigitsCnn(mean=0.0, deviation=1.0))
    if manifest.name == "mnist-softmax":
        return DigitsNet(mean=0.0, deviation=1.0, hidden=())
    return DigitsNet(mean=0.0, deviation=1.0)


def draw(manifest: Manifest) -> Array:
    """Return fresh inputs: for features, twice the range of training; for pictures, noise of every density."""
    generator = np.random.default_rng(random.getrandbits(64))  # pytest-randomly shows the seed and takes it back
    if manifest.input.kind == "image":
        density = generator.random((ROWS, 1))
        shape = (ROWS, *manifest.input.shape)
        pixels = generator.random(shape) * (generator.random(shape) < density)
        return np.asarray(pixels, np.float32)
    assert manifest.input.kind == "tabular"
    low = np.array([-1.0 if each.minimum is None else each.minimum for each in manifest.input.features])
    high = np.array([1.0 if each.maximum is None else each.maximum for each in manifest.input.features])
    middle, reach = (low + high) / 2, high - low
    return np.asarray(generator.uniform(middle - reach, middle + reach, (ROWS, len(low))), np.float32)


def ask(server: Server, manifest: Manifest, inputs: Array) -> Rows:
    """Return the served predictions."""
    path = f"/v1/models/{manifest.name}/versions/{manifest.version}:predict"
    found: Rows = []
    for start in range(0, len(inputs), ROWS_AT_ONCE):
        answer = server.post(path, json={"instances": inputs[start : start + ROWS_AT_ONCE].tolist()})
        assert answer.status_code == 200, answer.text
        found += answer.json()["predictions"]
    return found


@pytest.mark.parametrize("path", VERSIONS, ids=IDS)
def test_served_answers_equal_the_eager_net(path: Path, serving: Server) -> None:
    """On 1,000 fresh inputs each served number is within 1e-5 + 1e-4·|p| of eager PyTorch's, and every label equal."""
    manifest = load_manifest(path.parent)
    inputs = draw(manifest)
    with torch.inference_mode():
        outputs = build_eager(manifest, path.parent)(torch.from_numpy(inputs)).numpy()
    expected = postprocess.interpret(outputs, manifest)
    served = ask(serving, manifest, inputs)
    key = "prediction" if manifest.task == "regression" else "probabilities"
    actual = np.array([row[key] for row in served], np.float32).reshape(expected.shape)
    assert worst_excess(actual, expected) <= 0
    if manifest.task != "regression":
        indices = postprocess.decide(expected, manifest).tolist()
        # An input on the very boundary may fall on either side: there the probabilities agree, and that was tested.
        clear = np.abs(np.diff(np.sort(expected, axis=1)[:, -2:])).reshape(-1) > 1e-5
        wrong = [n for n, row in enumerate(served) if row["prediction"] != indices[n] and clear[n]]
        assert not wrong
        assert all(row["label"] == manifest.output.labels[row["prediction"]] for row in served)


def test_every_recipe_is_shipped(serving: Server) -> None:
    """All recipes are published and serve."""
    names = [model["name"] for model in serving.get("/v1/models").json()["models"]]
    assert set(RECIPES) <= set(names)
    assert set(names) == {path.parent.parent.name for path in VERSIONS}
    assert serving.get("/health/ready").json() == {"ready": True}


@pytest.mark.parametrize("model", ["linear", "linear-by-hand"])
def test_numbers_too_large_to_answer_are_a_400(model: str, serving: Server) -> None:
    """A feature that overflows the graph's float32 is the request's fault; the largest that does not is answered."""
    for number, status in ((3.4e38, 400), (1e30, 200)):
        answer = serving.predict(model, [[number]])
        assert answer.status_code == status
        if status == 400:
            assert answer.json() == {"error": "the model has no finite answer for these values; they may be too large"}


def test_verify_passes() -> None:
    """`python -m service verify` finds every digest, golden sample and parity right."""
    done = run_service("verify")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = sum(len(load_manifest(path.parent).artifacts) for path in VERSIONS)
    assert done.stdout.splitlines()[-1] == f"{checks} checks of {len(VERSIONS)} versions, 0 skipped, 0 failed"


@pytest.mark.full_mnist
@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR names no folder with the whole MNIST data set")
@pytest.mark.parametrize("path", DIGITS, ids=lambda path: path.parent.parent.name)
def test_served_accuracy_is_the_manifests(serving: Server, path: Path) -> None:
    """On MNIST's 10,000 test images the service is right exactly as often as the manifest states."""
    from training.data import as_floats, load_digits  # noqa: PLC0415 - it needs the data set

    manifest = load_manifest(path.parent)
    test = load_digits(Path(os.environ["MNIST_DIR"])).test
    served = ask(serving, manifest, as_floats(test.inputs).numpy())
    hits = sum(row["prediction"] == target for row, target in zip(served, test.targets.tolist(), strict=True))
    assert hits / len(served) == pytest.approx(manifest.metrics["accuracy"], abs=1e-9)
