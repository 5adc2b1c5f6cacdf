"""Tests of models without a task: service.model.tensor_model in a registry, and what the protocol makes of them."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from onnx import helper

from service.api.headers import RequestHeaders
from service.api.v2.datatypes import DATATYPES
from service.api.v2.decode import InferCall, decode
from service.api.v2.encode import encode
from service.api.v2.infer_request import parse_request
from service.errors import InferenceError, InvalidRequestError
from service.model.batching import Batcher
from service.model.cost import Cost
from service.model.manifest import TensorManifest
from service.model.tensor_model import TensorBackend, TensorPredictor, Tensors
from service.registry.registry import Registry
from service.settings import Settings
from tests import fakes
from tests.waiter import FutureWaiter

REQUEST = Tensors(x=np.zeros(1, np.float32))


def load_echo(root: Path) -> tuple[TensorPredictor, Batcher]:
    """Load a model from x to y, and return what runs it."""
    about = ("FP32", [-1])
    fakes.write_signature(root, "echo", {"x": about}, {"y": about}, helper.make_node("Identity", ["x"], ["y"]))
    registry = Registry(Settings(models_dir=root, device="cpu", backend="onnx"))
    registry.load()
    version = registry.get("echo")
    assert isinstance(version.predictor, TensorPredictor)
    assert isinstance(version.batcher, Batcher)
    return version.predictor, version.batcher


def run_three(batcher: Batcher, note: Callable[[], object]) -> None:
    """Submit three requests, and call `note` after each answer."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        waiters = [FutureWaiter(loop=loop) for _ in range(3)]
        for waiter in waiters:
            batcher.submit(REQUEST, loop.time() + 10, waiter)
        for waiter in waiters:
            await waiter
            note()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_call_in_the_thread_is_answered_when_it_ends(empty_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that wait for the thread do not wait for each other's calls."""
    gate = threading.Semaphore(1)

    def predict(self: TensorPredictor, inputs: Tensors) -> Tensors:
        del self
        assert gate.acquire(timeout=5), "the answer of the call before this one was not given"
        return inputs

    monkeypatch.setattr(TensorPredictor, "measure_cost", lambda self, max_rows: Cost(1.0, 1.0))
    monkeypatch.setattr(TensorPredictor, "predict", predict)
    run_three(load_echo(empty_dir)[1], gate.release)


def test_calls_on_the_loop_take_a_turn_each(empty_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests wait, the event loop stands still for one call, not for them all."""
    calls: list[Tensors] = []

    def predict(self: TensorPredictor, inputs: Tensors) -> Tensors:
        del self
        calls.append(inputs)
        return inputs

    monkeypatch.setattr(TensorPredictor, "measure_cost", lambda self, max_rows: Cost(0.0, 1e-6))
    monkeypatch.setattr(TensorPredictor, "predict", predict)
    made: list[int] = []  # calls by each answer
    run_three(load_echo(empty_dir)[1], lambda: made.append(len(calls)))
    assert made[0] < 3
    assert made[-1] == 3


def test_cost_grows_with_the_requests(empty_dir: Path) -> None:
    """Every request is a call of its own, so ten of them cost ten times as much as one."""
    cost = load_echo(empty_dir)[0].measure_cost(64)
    assert cost.fixed == 0
    assert 0 < cost.each < 1


def describe_tensors(datatype: str, shape: list[int]) -> TensorManifest:
    """Return the manifest of a model without a task from x to y."""
    specs = {
        place: [{"name": name, "datatype": datatype, "shape": shape}]
        for place, name in (("inputs", "x"), ("outputs", "y"))
    }
    artifact = {"file": "model.onnx", "sha256": "0" * 64, "bytes": 1}
    fields = {"name": "echo", "version": 1, "task": "tensors", "artifacts": {"onnx": artifact}} | specs
    return TensorManifest.model_validate_json(orjson.dumps(fields))


def ask_for_classes(datatype: str, count: int) -> bytes:
    """Return a request's JSON that asks such a model, of shape [-1, 4], for the classes of its output."""
    tensor = {"name": "x", "datatype": datatype, "shape": [1, 4], "parameters": {"binary_data_size": 0}}
    wanted = {"name": "y", "parameters": {"classification": count}}
    return orjson.dumps({"inputs": [tensor], "outputs": [wanted]})


@pytest.mark.parametrize(
    ("datatype", "row", "top"),
    [
        ("UINT8", [0, 1, 200, 255], ["255:3", "200:2", "1:1"]),
        ("INT8", [-128, 5, 5, -1], ["5:1", "5:2", "-1:3"]),
        ("UINT64", [2**63, 0, 2**64 - 2**12, 1], ["18446744073709547520:2", "9223372036854775808:0"]),
        ("FP16", [0.5, np.nan, 1, -1], ["1.000000:2", "0.500000:0", "-1.000000:3"]),
    ],
)
def test_classification_of_any_numbers(datatype: str, row: list[float], top: list[str]) -> None:
    """The largest come first whatever the datatype; of equal ones the first, and what is no number last."""
    manifest = describe_tensors(datatype, [-1, 4])
    request = parse_request(ask_for_classes(datatype, len(top)), manifest)
    outputs = Tensors(y=np.array([row], DATATYPES[datatype]))
    _, body = encode(outputs, manifest, InferCall(Tensors(), None, request.outputs, None))
    (output,) = orjson.loads(body)["outputs"]
    assert output["data"] == top


@pytest.mark.parametrize("datatype", ["BOOL", "BYTES"])
def test_what_are_no_numbers_have_no_classes(datatype: str) -> None:
    """Flags and text have no largest: the request is refused."""
    with pytest.raises(InvalidRequestError, match=r"outputs\[0\] asks for classes of 'y', which has none"):
        parse_request(ask_for_classes(datatype, 1), describe_tensors(datatype, [-1, 4]))


def test_raw_text_has_the_shape_of_its_input() -> None:
    """A raw body of BYTES is one element of as many dimensions as the input has; an input of more refuses it."""
    head = RequestHeaders(b"id", json_length=b"0")
    inputs = decode(b"word", describe_tensors("BYTES", [-1, 1]), head).inputs
    assert isinstance(inputs, Tensors)
    assert inputs["x"].tolist() == [[b"word"]]
    with pytest.raises(InvalidRequestError, match=r"input 'x' has shape \[1, 1\], the model takes \[-1, 2\]"):
        decode(b"word", describe_tensors("BYTES", [-1, 2]), head)


def test_tensors_weigh_what_they_take() -> None:
    """Each element of BYTES is an object, which weighs more than a short text."""
    numbers, texts = np.zeros((10, 2), np.float32), np.array([b"ab"] * 1000, dtype=object)
    assert Tensors({"x": numbers}).nbytes == 80
    assert Tensors({"x": numbers, "y": texts}).nbytes > 1000 * (8 + 33 + 2)


@pytest.mark.parametrize("text", ["Failed to allocate memory for requested buffer of size 99", "std::bad_alloc"])
def test_too_little_memory_is_not_the_callers_fault(text: str, empty_dir: Path) -> None:
    """A graph that finds no memory for its tensors has failed, which says nothing against the tensors."""
    predictor, _ = load_echo(empty_dir)

    class Session:
        """A session that has no memory."""

        def run(self, *_: object) -> None:
            """Fail as onnxruntime does."""
            raise RuntimeError(f"Non-zero status code returned while running Expand node. Status Message: {text}")

    full = replace(predictor, backend=TensorBackend(Session(), "cpu", "CPU"))
    with pytest.raises(InferenceError, match=r"^it needs more memory for this input than cpu has left$"):
        full.predict(Tensors())
