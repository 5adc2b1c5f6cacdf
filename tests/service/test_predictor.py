"""Tests of service.model.predictor."""

import io
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from service.errors import InferenceError, InvalidRequestError, ModelRefusedError, StartError
from service.model import postprocess
from service.model import predictor as module
from service.model.predictor import load_predictor, worst_excess
from tests import fakes


@pytest.mark.parametrize("backend", ["auto", "onnx", "torchscript"])
@pytest.mark.parametrize("build", fakes.GOOD)
def test_good_models_load_and_predict(build: Any, backend: str, tmp_path: Path) -> None:
    """Each backend's predictor passes its checks and gives finite probabilities that sum to 1, or values."""
    predictor = load_predictor(fakes.write_version(tmp_path, build()), backend, "cpu")
    assert predictor.backend.name == ("onnx" if backend == "auto" else backend)
    shape = predictor.manifest.input.shape
    results = predictor.predict(np.random.default_rng(0).random((5, *shape), dtype=np.float32))
    assert np.isfinite(results).all()
    if predictor.manifest.task != "regression":
        probabilities = postprocess.interpret(results, predictor.manifest)
        assert probabilities.shape == (5, len(predictor.manifest.output.labels))
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["model.onnx", "model.pt"])
def test_any_changed_artifact_refuses_the_version(name: str, tmp_path: Path) -> None:
    """A version with one changed byte is refused, also when the changed artifact is not the one that would run."""
    folder = fakes.write_version(tmp_path, fakes.doubler())
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ModelRefusedError, match=f"{name} has sha256"):
        load_predictor(folder, "auto", "cpu")


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (fakes.liar(), "its onnx graph on cpu misses a golden output by 1 more than the tolerance"),
        (fakes.shapeshifter(), r"fails on random inputs: the graph gave outputs of shape \(2, 2\), expected \(2, 1\)"),
        (fakes.picky(), "its onnx graph fails on random inputs: onnxruntime: "),
        (replace(fakes.doubler().only("onnx"), contents={"onnx": b"not a graph"}), "cannot load the graph"),
    ],
)
def test_broken_model_is_refused_with_its_reason(fake: fakes.FakeModel, message: str, tmp_path: Path) -> None:
    """A graph that does not give what its manifest says never becomes a predictor."""
    with pytest.raises(ModelRefusedError, match=message):
        load_predictor(fakes.write_version(tmp_path, fake), "auto", "cpu")


def test_rounded_artifact_has_its_own_tolerance(tmp_path: Path) -> None:
    """Golden outputs may be missed by an artifact's own tolerance, and by no more; the other artifacts by none."""
    fake = fakes.doubler()
    rounded = replace(fake, contents=fake.contents | {"onnx-int8": fakes.doubler(factor=2.01).contents["onnx"]})
    for tolerance, accepted in ((0.1, True), (0.001, False)):
        fields = rounded.fields()
        fields["artifacts"]["onnx-int8"]["tolerance"] = tolerance
        folder = fakes.write_version(tmp_path / str(tolerance), rounded)
        (folder / "manifest.json").write_text(json.dumps(fields))
        assert load_predictor(folder, "auto", "cpu").backend.name == "onnx"
        if accepted:
            assert load_predictor(folder, "onnx-int8", "cpu").backend.name == "onnx-int8"
        else:
            with pytest.raises(ModelRefusedError, match="its onnx-int8 graph on cpu misses a golden output"):
                load_predictor(folder, "onnx-int8", "cpu")


def test_folder_and_manifest_must_agree(tmp_path: Path) -> None:
    """A manifest that stands in another model's or version's folder is refused."""
    folder = fakes.write_version(tmp_path, fakes.doubler())
    moved = folder.rename(folder.parent / "3")
    with pytest.raises(ModelRefusedError, match="the manifest is of doubler/1, not of doubler/3"):
        load_predictor(moved)


def test_missing_backend_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without the artifact asked for, or without the package to run it, is refused and says what to do."""
    folder = fakes.write_version(tmp_path, fakes.doubler().only("torchscript"))
    with pytest.raises(ModelRefusedError, match="it has torchscript, not the onnx artifact that --backend asks for"):
        load_predictor(folder, "onnx")
    monkeypatch.setattr("service.model.backends.is_installed", lambda name: name == "onnx")
    with pytest.raises(ModelRefusedError, match=r"cannot run here; install the torch extra: pip install '\.\[torch\]'"):
        load_predictor(folder)


def test_not_finite_is_refused_when_predicting(tmp_path: Path) -> None:
    """A graph's NaN or infinity is the fault of the inputs and never an answer; other rows are fine."""
    predictor = load_predictor(fakes.write_version(tmp_path, fakes.logarithm()), "onnx", "cpu")
    assert predictor.predict(np.ones((1, 1), np.float32)).tolist() == [[0]]
    for number in (0.0, -1.0):
        with pytest.raises(InvalidRequestError, match="no finite answer"):
            predictor.predict(np.array([[number]], np.float32))


@pytest.mark.parametrize("answer", [1.25, -0.25])
@pytest.mark.parametrize("kind", ["probability", "probabilities"])
def test_no_probability_is_the_models_failure(kind: str, answer: float, tmp_path: Path) -> None:
    """What the manifest calls a probability and is none is never an answer; rounding is no matter."""
    contents = fakes.build_affine(np.array([[1.0], [0]], np.float32), np.zeros(1, np.float32))
    if kind == "probabilities":
        contents = fakes.build_affine(np.eye(2, dtype=np.float32), np.zeros(2, np.float32))
    fake = replace(fakes.coin(), output={"kind": kind, "labels": ["a", "b"]}, contents=contents)
    predictor = load_predictor(fakes.write_version(tmp_path, fake), "onnx", "cpu")
    for fine in (0.0, 1.0, 1.0005, -0.0005):
        assert predictor.predict(np.array([[fine, 1 - fine]], np.float32)).shape == (1, predictor.width)
    with pytest.raises(InferenceError, match="where its manifest says probabilities"):
        predictor.predict(np.array([[0.5, 0.5], [answer, 0.5]], np.float32))
    with pytest.raises(InvalidRequestError, match="no finite answer"):
        predictor.predict(np.array([[np.nan, 0]], np.float32))
    assert predictor.predict(np.zeros((0, 2), np.float32)).shape == (0, predictor.width)


@pytest.mark.parametrize("golden", [None, [[1.0]], [[0.5], [1.0]]])
def test_answer_that_depends_on_the_batch_is_refused(golden: Any, tmp_path: Path) -> None:
    """Callers share batches, so a graph that looks at the other rows is refused, with golden samples or without."""
    mean = helper.make_node("ReduceMean", ["inputs"], ["mean"], axes=[0])
    content = fakes.build_onnx(mean, helper.make_node("Sub", ["inputs", "mean"], ["outputs"]), wide=1, out=1)
    more: dict[str, Any] = {}
    if golden:
        given = np.array(golden) - np.mean([*golden, *([[0.5]] if len(golden) == 1 else [])])
        more = {"golden": {"inputs": golden, "outputs": given.tolist()}}
    fake = replace(fakes.doubler(), contents={"onnx": content}, more=more)
    with pytest.raises(ModelRefusedError, match="another answer beside others than alone; export the net in eval"):
        load_predictor(fakes.write_version(tmp_path, fake), "onnx", "cpu")


@pytest.mark.parametrize(("seconds", "alone"), [(0.2, 2), (0.0, 1)])
def test_slow_graph_is_run_on_one_instance_alone(
    seconds: float, alone: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the golden batch, two instances are run alone; only one where that takes long."""
    monkeypatch.setattr(module, "_ALONE_SECONDS", seconds)
    predictor = load_predictor(fakes.write_version(tmp_path, fakes.doubler()), "onnx", "cpu")
    sizes: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(predictor.backend, name)

        def run(self, inputs: Any) -> Any:
            sizes.append(len(inputs))
            return predictor.backend.run(inputs)

    module.check_golden(replace(predictor, backend=Counting()))
    assert sizes[1:] == [1] * alone


def test_net_traced_in_training_mode_is_refused(tmp_path: Path) -> None:
    """BatchNorm in training mode norms by the batch: a row alone becomes zero."""
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns that it is deprecated, and of what it does not record
        traced = torch.jit.trace(net, torch.rand(3, 1), check_trace=False)  # type: ignore[no-untyped-call]
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
    fake = replace(fakes.doubler(), contents={"torchscript": buffer.getvalue()}, more={})
    with pytest.raises(ModelRefusedError, match="its torchscript graph gives an instance another answer"):
        load_predictor(fakes.write_version(tmp_path, fake), "torchscript", "cpu")


def test_graph_that_fails_on_one_row_is_refused(tmp_path: Path) -> None:
    """A graph made for two rows, such as one that reshapes to them, could not answer a lone request."""
    shape: Any = {"shape": np.array([2, 1], np.int64)}
    node = helper.make_node("Reshape", ["inputs", "shape"], ["outputs"])
    content = fakes.build_onnx(node, weights=shape, wide=1, out=1)
    fake = replace(fakes.doubler(), contents={"onnx": content}, more={})
    with pytest.raises(ModelRefusedError, match="fails on one instance alone, as a net in training mode does: onnxr"):
        load_predictor(fakes.write_version(tmp_path, fake), "onnx", "cpu")


def test_device_asked_for_by_name_is_used_or_refused(tmp_path: Path) -> None:
    """A device that is not there is a StartError, with each backend's reason."""
    folder = fakes.write_version(tmp_path, fakes.doubler())
    with pytest.raises(StartError, match=r"onnx backend here.*; .*torchscript backend here"):
        load_predictor(folder, "auto", "cuda:99")


def test_auto_takes_the_first_backend_that_reaches_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only PyTorch reaches a GPU, "auto" runs TorchScript there; without one, ONNX on the CPU."""
    reach = {"onnx": "cpu", "torchscript": "cuda:0"}
    monkeypatch.setattr(module, "choose_device", lambda device, name, preferred="": reach[name])
    assert module._choose_places(["onnx", "torchscript"], "auto", "cuda:0")[0] == ("torchscript", "cuda:0")
    reach["torchscript"] = "cpu"
    assert module._choose_places(["onnx", "torchscript"], "auto", "cuda:0")[0] == ("onnx", "cpu")


def test_auto_says_that_a_gpu_could_not_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a build lists a GPU that it then cannot use, "auto" runs on the CPU, says so once, and shows the CPU."""
    monkeypatch.setattr("service.model.backends.list_accelerators", lambda name: ["cuda:0"] if name == "onnx" else [])
    real = ort.InferenceSession  # whose first provider's libraries do not load
    monkeypatch.setattr(ort, "InferenceSession", lambda *given, providers, **_: real(*given, providers=providers[-1:]))
    module._warn_once.cache_clear()
    for version in (1, 2):
        folder = fakes.write_version(tmp_path, fakes.doubler(version=version))
        backend = load_predictor(folder).backend
        assert (backend.name, backend.device, backend.provider) == ("onnx", "cpu", "CPUExecutionProvider")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("fell back to the CPU where cuda:0 was asked for; models run by onnx on cpu instead")
    with pytest.raises(StartError, match="fell back to the CPU where cuda:0 was asked for"):
        load_predictor(folder, "auto", "cuda")


def test_worker_keeps_to_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several GPUs, "cuda" takes that on which the worker was placed, as "auto" does; else the first."""
    monkeypatch.setattr("service.model.backends.list_accelerators", lambda name: ["cuda:0", "cuda:1"])
    for device in ("auto", "cuda"):
        assert module._choose_places(["onnx"], device, "cuda:1")[0] == ("onnx", "cuda:1")
        assert module._choose_places(["onnx"], device, "cpu")[0] == ("onnx", "cuda:0")


def test_worst_excess_is_the_stated_tolerance() -> None:
    """Coordination is |a - b| <= 1e-5 + 1e-4·|b|; NaN agrees with nothing, not even NaN."""
    one = np.ones((1, 1), np.float32)
    assert worst_excess(one, one) <= 0
    assert worst_excess(one * np.float32(1.0001), one) <= 0
    assert worst_excess(one * np.float32(1.0002), one) > 0
    assert worst_excess(one * np.nan, one) == float("inf")
    assert worst_excess(one * np.nan, one * np.nan) == float("inf")
