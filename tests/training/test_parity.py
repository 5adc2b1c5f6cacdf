"""Parity passes equal artifacts and refuses different ones."""

import numpy as np
import pytest
import torch

from service.model.backends import Array
from service.model.manifest import Artifact, Feature, ImageInput, ImageSpec, Manifest, Output, TabularInput
from service.model.predictor import Predictor
from training.errors import CheckError
from training.export import export
from training.nets import LinearNet, ServingNet
from training.parity import BATCH_SIZES, build_batches, check_parity, open_predictors

MANIFEST = Manifest(
    name="plane",
    version=1,
    task="binary",
    input=TabularInput(
        kind="tabular",
        shape=(2,),
        features=(Feature(name="x0", minimum=-3, maximum=4), Feature(name="x1", minimum=5, maximum=6)),
    ),
    output=Output(kind="probability", labels=("no", "yes"), threshold=0.5),
    artifacts={"onnx": Artifact(file="model.onnx", sha256="0" * 64, bytes=1)},
)


class ShiftedBackend:
    """Adds a constant to another backend's outputs."""

    name = "onnx"
    device = "cpu"
    provider = "shifted"

    def __init__(self, predictor: Predictor, shift: float) -> None:
        self._inner = predictor.backend
        self._shift = np.float32(shift)

    def run(self, inputs: Array) -> Array:
        """Return shifted outputs."""
        return self._inner.run(inputs) + self._shift


@pytest.fixture(scope="module")
def serving() -> ServingNet:
    """A logistic serving net from fixed parameters."""
    torch.manual_seed(0)
    return ServingNet(LinearNet(2), "binary").eval()


def test_artifacts_agree_with_their_net(serving: ServingNet) -> None:
    """Both artifacts of a net pass, and the largest difference is reported for each."""
    predictors = open_predictors(MANIFEST, export(serving, (2,)))
    differences = check_parity(serving, predictors, seed=0)
    assert set(differences) == {"onnx", "torchscript"}
    assert all(0 <= difference < 1e-5 for difference in differences.values())


@pytest.mark.parametrize("shift", [1e-3, float("nan")])
def test_a_difference_is_found(serving: ServingNet, shift: float) -> None:
    """A backend that is off by 0.001, or gives NaN, fails the check."""
    predictor = open_predictors(MANIFEST, export(serving, (2,)))["onnx"]
    shifted = Predictor(MANIFEST, ShiftedBackend(predictor, shift))  # type: ignore[arg-type]
    with pytest.raises(CheckError, match="differs from the net"):
        check_parity(serving, {"onnx": shifted}, seed=0)


def test_another_net_is_found(serving: ServingNet) -> None:
    """The artifacts of one net do not pass for another."""
    other = ServingNet(LinearNet(2), "binary").eval()
    with pytest.raises(CheckError):
        check_parity(other, open_predictors(MANIFEST, export(serving, (2,))), seed=0)


def test_what_does_not_open_is_one_line() -> None:
    """Bytes that are no graph are refused with one sentence."""
    with pytest.raises(CheckError, match="does not open"):
        open_predictors(MANIFEST, {"onnx": b"no graph"})


def test_batches() -> None:
    """There is a batch of each size within the features' ranges, and one of values far outside."""
    *random, edges = build_batches(MANIFEST, seed=0)
    assert [len(batch) for batch in random] == list(BATCH_SIZES)
    for batch in random:
        assert batch.dtype == np.float32
        assert ((batch >= [-3, 5]) & (batch <= [4, 6])).all()
    assert edges.tolist() == [[0, 0], [1, 1], [-30, 50], [40, 60]]


def test_batches_of_pixels_stay_in_range() -> None:
    """An image model is compared on pixels in [0, 1] only."""
    described = ImageInput(kind="image", shape=(784,), image=ImageSpec(width=28, height=28))
    manifest = MANIFEST.model_copy(update={"input": described})
    for batch in build_batches(manifest, seed=0):
        assert batch.shape[1:] == (784,)
        assert batch.min() >= 0
        assert batch.max() <= 1
