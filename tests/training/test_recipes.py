"""Each recipe reaches the figures of its tutorial, and so do the published models."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from service.model import postprocess
from service.model.manifest import BackendName
from service.model.predictor import load_predictor
from service.model.version_folder import load_manifest
from tests.training.conftest import PUBLISHED
from training import data, mnist, recipes
from training.data import Splits, as_floats
from training.evaluate import predict
from training.recipes import RECIPES
from training.trainer import Settings

CPU = torch.device("cpu")
SHIPPED = sorted(path.name for path in PUBLISHED.iterdir() if path.name in RECIPES)
DIGITS = [name for name in SHIPPED if RECIPES[name].task == "multiclass"]
FULL_MNIST = os.environ.get("MNIST_DIR")


def test_clusters_stop_where_the_tutorial_does() -> None:
    """From the tutorial's own random state, training stops at iteration 380 with 199 of 200 points right."""
    torch.manual_seed(10)
    for side in (1, -1):
        torch.normal(1.7 * side * torch.ones(100, 2), 1.0)  # the tutorial draws its data first
    splits = data.load_clouds()
    fitted = recipes.fit_logistic_clusters(splits, Settings(1000, CPU))
    hits = ((fitted.net(splits.train.inputs) >= 0) == (splits.train.targets == 1)).sum().item()
    assert len(fitted.history) == 380
    assert hits == 199
    assert list(fitted.boundaries) == list(range(20, 381, 20))


def test_drawn_boundary_is_the_measured_one() -> None:
    """The last boundary kept for the plot is the net that is published."""
    fitted = recipes.fit_logistic_clusters(data.load_clouds(), Settings(1000, CPU))
    weights, bias = list(fitted.boundaries.values())[-1]
    assert isinstance(fitted.net, nn.Linear)
    assert torch.equal(weights, fitted.net.weight)
    assert torch.equal(bias, fitted.net.bias)


def fit_hours(reduction: str, epochs: int) -> tuple[float, float]:
    """Return the last loss and P(pass | 4 h) after training from seed 0 with a summed or averaged loss."""
    train = data.load_hours().train
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    criterion = nn.BCEWithLogitsLoss(reduction=reduction)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(epochs):
        optimizer.zero_grad()
        criterion(net(train.inputs), train.targets).backward()
        optimizer.step()
    with torch.no_grad():
        four = torch.sigmoid(net(torch.tensor([[4.0]])))
        return criterion(net(train.inputs), train.targets).item(), four.item()


def test_summed_loss_learns_three_times_faster() -> None:
    """On three students 1,000 epochs of the summed loss equal 3,000 of the mean; its 1,000 end at 0.56 and 0.61."""
    summed, mean, three_times = fit_hours("sum", 1000), fit_hours("mean", 1000), fit_hours("mean", 3000)
    assert summed == pytest.approx((1.0978, 0.8523), abs=1e-3)
    assert mean == pytest.approx((0.5596, 0.6135), abs=1e-3)
    assert three_times == pytest.approx((summed[0] / 3, summed[1]), abs=1e-3)


def test_hours_end_in_the_tutorials_range() -> None:
    """The summed loss ends between 0.93 and 1.17, as the tutorial's 1.1204 does."""
    torch.manual_seed(1)
    history = recipes.fit_logistic_hours(data.load_hours(), Settings(1000, CPU)).history
    assert 0.92 < history[-1].loss < 1.17


def test_linear_is_the_closed_form() -> None:
    """With `nn` and `optim` too, slope, intercept and error end within 1 % of least squares."""
    torch.manual_seed(0)
    splits = data.load_line()
    fitted = recipes.fit_linear(splits, Settings(100, CPU))
    figures = RECIPES["linear"].figures(fitted, splits)
    for name in ("slope", "intercept", "training_mse"):
        assert figures[name] == pytest.approx(figures[f"least_squares_{name}"], rel=0.01)


def test_mnist_learns_from_few_images(mnist_dir: Path) -> None:
    """4,000 images and 6 epochs already give 85 % on 1,000 others, and the best epoch is kept."""
    torch.manual_seed(0)
    splits = data.load_digits(mnist_dir)
    fitted = mnist.fit_mnist(splits, Settings(6, CPU))
    with torch.no_grad():
        decided = fitted.net(as_floats(splits.test.inputs)).argmax(dim=1)
    assert (decided == splits.test.targets).float().mean() > 0.85
    assert all(epoch.validation_loss is not None for epoch in fitted.history)


def newest(published: Path, name: str) -> Path:
    """Return the folder of a model's newest version."""
    return max((published / name).iterdir(), key=lambda folder: int(folder.name))


@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
@pytest.mark.parametrize("name", SHIPPED)
def test_published_version_loads(published: Path, name: str, backend: BackendName) -> None:
    """The newest version of every model passes digest and golden checks on both backends."""
    predictor = load_predictor(newest(published, name), backend=backend, device="cpu")
    assert predictor.manifest.training is not None
    assert predictor.manifest.training.recipe == name


def test_published_figures(published: Path) -> None:
    """The published models have the figures that the documentation quotes."""
    metrics = {name: load_manifest(newest(published, name)).metrics for name in SHIPPED}
    for name in ("linear", "linear-by-hand"):
        for figure in ("slope", "intercept", "training_mse"):
            assert metrics[name][figure] == pytest.approx(metrics[name][f"least_squares_{figure}"], rel=0.01)
    assert metrics["logistic-by-hand"]["direction_cosine"] >= 0.9999
    assert metrics["logistic-clusters"]["training_accuracy"] >= 0.99
    for name, accuracy in (("mnist", 0.978), ("mnist-mlp-best", 0.9945), ("mnist-cnn", 0.997)):
        assert round(metrics[name]["accuracy_mean"], 4) >= accuracy
    for name in DIGITS:
        assert metrics[name]["ece"] <= (0.02 if name == "mnist-softmax" else 0.005)


def test_published_models_are_small_and_name_no_machine(published: Path) -> None:
    """Plots are under 150 kB, everything under 15 MB; no manifest or graph contains a path."""
    files = [path for name in SHIPPED for path in (published / name).glob("*/*")]
    assert sum(path.stat().st_size for path in files) < 15e6
    assert all(path.stat().st_size < 150_000 for path in files if path.suffix == ".png")
    for path in files:
        if path.suffix not in (".png", ".gif"):
            content = path.read_bytes()
            assert not any(part in content for part in (b"/home/", b"/tmp/", b"/usr/", b"/root/", b"site-packages"))


@pytest.fixture(scope="module")
def full_mnist() -> Splits:
    """The whole of MNIST, from the folder in MNIST_DIR."""
    return data.load_digits(Path(FULL_MNIST or "."))


@pytest.mark.full_mnist
@pytest.mark.skipif(not FULL_MNIST, reason="set MNIST_DIR to a folder with the whole MNIST data set")
@pytest.mark.parametrize(
    ("name", "largest", "labels"), [("mnist", 0.09, 9), ("mnist-mlp-best", 0.23, 7), ("mnist-cnn", 0.09, 3)]
)
def test_quantized_weights_differ_as_documented(
    published: Path, full_mnist: Splits, name: str, largest: float, labels: int
) -> None:
    """The figures of docs/training.md for 8-bit weights; kernels of other machines may round differently."""
    exact, rounded = (
        predict(load_predictor(newest(published, name), backend=backend, device="cpu"), full_mnist.test)
        for backend in ("onnx", "onnx-int8")
    )
    apart = np.abs(exact - rounded).max(axis=1)
    assert apart.max() == pytest.approx(largest, abs=0.02)
    assert np.median(apart) == pytest.approx(0.003, abs=0.001)
    assert (exact.argmax(axis=1) != rounded.argmax(axis=1)).sum() == pytest.approx(labels, abs=2)


@pytest.mark.full_mnist
@pytest.mark.skipif(not FULL_MNIST, reason="set MNIST_DIR to a folder with the whole MNIST data set")
@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
@pytest.mark.parametrize("name", DIGITS)
def test_published_accuracy_is_exact(published: Path, full_mnist: Splits, name: str, backend: BackendName) -> None:
    """On the 10,000 test images both backends give exactly the accuracy that the manifest states, on the same data."""
    predictor = load_predictor(newest(published, name), backend=backend, device="cpu")
    decided = postprocess.decide(predict(predictor, full_mnist.test), predictor.manifest)
    assert float(np.mean(decided == full_mnist.test.targets.numpy())) == predictor.manifest.metrics["accuracy"]
    assert predictor.manifest.training is not None
    assert predictor.manifest.training.data == full_mnist.digests()
