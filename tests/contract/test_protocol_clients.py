"""The Open Inference Protocol as Triton's own clients speak it, sync and asyncio, over real HTTP."""

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from tests import fakes
from tests.servers import Server

ENCODINGS = (None, "gzip", "deflate")
FORMS = ("unlisted", "binary", "json", "mixed")
OUTPUTS = {"outputs": np.float32, "prediction": np.int64, "probabilities": np.float32, "label": np.object_}
LABELS = np.array([b"north", b"east", b"south", b"west"], object)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    """Triton's client."""
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as made:
        yield made


def build_input(rows: Any, binary: bool = True, module: Any = triton) -> Any:
    """Return the client's input tensor."""
    tensor = module.InferInput("inputs", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows, binary_data=binary)
    return tensor


def build_outputs(form: str, names: Any = tuple(OUTPUTS), module: Any = triton) -> Any:
    """Return the client's requested outputs, each as binary data or as JSON."""
    if form == "unlisted":
        return None
    flags = {"binary": itertools.repeat(True), "json": itertools.repeat(False), "mixed": itertools.cycle((True, False))}
    return [module.InferRequestedOutput(name, binary_data=flag) for name, flag in zip(names, flags[form], strict=False)]


def draw_rows(count: int) -> Any:
    """Return random rows for `compass`, float32."""
    return np.random.default_rng(random.getrandbits(64)).normal(0, 3, (count, 2)).astype(np.float32)


def check_compass(result: Any, rows: Any, form: str) -> None:
    """Check every output of `compass` for rows: names, order, form, datatypes, and values to the bit."""
    answer = result.get_response()
    assert [output["name"] for output in answer["outputs"]] == list(OUTPUTS)
    binary = ["data" not in output for output in answer["outputs"]]
    flags = {"unlisted": [True] * 4, "binary": [True] * 4, "json": [False] * 4, "mixed": [True, False, True, False]}
    assert binary == flags[form]
    logits = rows @ fakes.COMPASS_WEIGHTS
    np.testing.assert_array_equal(result.as_numpy("outputs"), logits)
    np.testing.assert_array_equal(result.as_numpy("prediction"), logits.argmax(axis=1))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(result.as_numpy("probabilities"), powers / powers.sum(axis=1, keepdims=True), rtol=1e-5)
    labels = [label.encode() if isinstance(label, str) else label for label in result.as_numpy("label")]
    assert labels == LABELS[logits.argmax(axis=1)].tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("binary", [True, False])
def test_every_encoding_with_the_sync_client(binary: bool, form: str, client: Any) -> None:
    """Inputs and outputs each binary, JSON, mixed or unlisted, with and without compression: the same answer."""
    for count, sent, wanted in itertools.product((3, 2000), ENCODINGS, ENCODINGS):
        rows = draw_rows(count)
        result = client.infer(
            "compass",
            [build_input(rows, binary)],
            outputs=build_outputs(form),
            request_id=f"{count}-{sent}",
            request_compression_algorithm=sent,
            response_compression_algorithm=wanted,
        )
        check_compass(result, rows, form)
        assert result.get_response()["id"] == f"{count}-{sent}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("binary", [True, False])
def test_every_encoding_with_the_asyncio_client(binary: bool, form: str, server: Server) -> None:
    """The asyncio client gets the same, with requests side by side on its connections."""

    async def ask(client: Any, count: int, sent: str | None, wanted: str | None) -> None:
        rows = draw_rows(count)
        result = await client.infer(
            "compass",
            [build_input(rows, binary, triton_aio)],
            outputs=build_outputs(form, module=triton_aio),
            request_compression_algorithm=sent,
            response_compression_algorithm=wanted,
        )
        check_compass(result, rows, form)

    async def run() -> None:
        async with triton_aio.InferenceServerClient(server.url.removeprefix("http://")) as client:
            await asyncio.gather(*(ask(client, *case) for case in itertools.product((3, 400), ENCODINGS, ENCODINGS)))

    asyncio.run(run())


def test_ten_thousand_random_rows_come_back(client: Any) -> None:
    """10,000 random rows over HTTP: exact in binary, and equal as float32 in JSON, in and out."""
    for binary, form in itertools.product((True, False), ("binary", "json")):
        rows = draw_rows(2500)
        result = client.infer("compass", [build_input(rows, binary)], outputs=build_outputs(form, ["outputs"]))
        np.testing.assert_array_equal(result.as_numpy("outputs").astype(np.float32), rows @ fakes.COMPASS_WEIGHTS)


@pytest.mark.parametrize("names", list(itertools.permutations(("label", "outputs", "prediction"))))
def test_outputs_are_those_asked_for_in_that_order(names: Any, client: Any) -> None:
    """Requested outputs are given, no others, in the order of the request."""
    result = client.infer("compass", [build_input(draw_rows(2))], outputs=build_outputs("mixed", names))
    assert [output["name"] for output in result.get_response()["outputs"]] == list(names)


def test_every_task_has_its_outputs(client: Any) -> None:
    """Regression, binary and multiclass models give the graph's own output and what the task makes of it."""
    row = np.array([[2.0, 1.0]], np.float32)
    coin = client.infer("coin", [build_input(row)])
    assert coin.as_numpy("outputs") == pytest.approx(np.array([[1 / (1 + np.exp(-1))]]))
    assert (coin.as_numpy("prediction").tolist(), coin.as_numpy("label").tolist()) == ([1], [b"heads"])
    assert coin.as_numpy("probabilities").sum() == pytest.approx(1)
    doubler = client.infer("doubler", [build_input(row[:, :1])])
    assert doubler.as_numpy("outputs").tolist() == [[5.0]]
    assert doubler.as_numpy("prediction").tolist() == [5.0]
    switch = client.infer("switch", [build_input(row[:, :1])])
    assert switch.as_numpy("outputs").tolist() == [[20.0]]
    canvas = client.infer("canvas", [build_input(np.full((2, 784), 0.5, np.float32))])
    np.testing.assert_array_equal(canvas.as_numpy("outputs"), canvas.as_numpy("probabilities"))
    assert canvas.as_numpy("label").shape == (2,)


def test_versions_are_chosen_in_the_path(client: Any) -> None:
    """A version in the path is that version; without one it is the latest; an unknown one is said."""
    tensor = build_input(np.array([[2.0]], np.float32))
    for version, expected in (("", 5.0), ("1", 4.0), ("2", 5.0)):
        result = client.infer("doubler", [tensor], model_version=version)
        assert result.as_numpy("outputs").tolist() == [[expected]]
        assert result.get_response()["model_version"] == (version or "2")
    with pytest.raises(
        InferenceServerException, match="Request for unknown model: 'doubler' has no version '9'"
    ) as caught:
        client.infer("doubler", [tensor], model_version="9")
    assert caught.value.status() == "404"


@pytest.mark.parametrize(
    "ask",
    [
        lambda client, _: client.infer("nosuch", [build_input(draw_rows(1))]),
        lambda client, _: client.get_model_metadata("nosuch"),
        lambda client, _: client.get_model_config("nosuch"),
        lambda client, _: client.get_inference_statistics("nosuch"),
        lambda client, headers: client.load_model("nosuch", headers=headers),
        lambda client, headers: client.unload_model("nosuch", headers=headers),
    ],
)
def test_unknown_model_is_said_as_clients_expect(ask: Callable[[Any, Any], Any], client: Any, server: Server) -> None:
    """Triton's own examples look for the start of this sentence."""
    with pytest.raises(InferenceServerException) as caught:
        ask(client, server.token_headers())
    assert caught.value.message().startswith("Request for unknown model: 'nosuch'")
    assert caught.value.status() == "404"


@pytest.mark.parametrize("binary", [True, False])
def test_classification(binary: bool, client: Any) -> None:
    """The classification extension gives "value:index:label", the largest first, as BYTES."""
    output = triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)
    result = client.infer("compass", [build_input(np.array([[0, 3], [5, 0]], np.float32))], outputs=[output])
    classes = result.as_numpy("probabilities")
    assert classes.shape == (2, 2)
    texts = [[text.decode() if isinstance(text, bytes) else text for text in row] for row in classes.tolist()]
    assert [row[0].split(":")[1:] for row in texts] == [["0", "north"], ["1", "east"]]
    assert float(texts[0][0].split(":")[0]) > float(texts[0][1].split(":")[0])


def test_what_the_server_says_of_itself(client: Any) -> None:
    """Health, metadata, configuration, statistics and index, as the client reads them."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("compass")
    assert client.is_model_ready("doubler", "1")
    assert not client.is_model_ready("nosuch")
    assert not client.is_model_ready("doubler", "9")
    server = client.get_server_metadata()
    assert "binary_tensor_data" in server["extensions"]
    metadata = client.get_model_metadata("doubler")
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("doubler", ["1", "2"], "onnx_onnxv1")
    assert metadata["inputs"] == [{"name": "inputs", "datatype": "FP32", "shape": [-1, 1]}]
    assert metadata["outputs"] == [
        {"name": "outputs", "datatype": "FP32", "shape": [-1, 1]},
        {"name": "prediction", "datatype": "FP32", "shape": [-1]},
    ]
    assert client.get_model_config("doubler")["max_batch_size"] == 64
    index = client.get_model_repository_index()
    assert {(row["name"], row["version"], row["state"]) for row in index} >= {
        ("doubler", "1", "READY"),
        ("doubler", "2", "READY"),
        ("compass", "1", "READY"),
    }


def test_statistics_count(client: Any) -> None:
    """Each answered row is counted, soon after its answer: figures are written ten times a second."""

    def read() -> tuple[int, int, int]:
        (row,) = client.get_inference_statistics("switch", "1")["model_stats"]
        return row["inference_stats"]["success"]["count"], row["execution_count"], row["inference_count"]

    time.sleep(0.5)
    before = read()
    for _ in range(4):
        client.infer("switch", [build_input(np.ones((3, 1), np.float32))])
    until = time.monotonic() + 10
    while read() == before and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.2)
    assert [after - first for after, first in zip(read(), before, strict=True)] == [4, 4, 12]


@pytest.mark.parametrize("datatype", ["FP16", "FP64", "INT64", "UINT8"])
@pytest.mark.parametrize("binary", [True, False])
def test_numbers_of_another_datatype_and_name(client: Any, datatype: str, binary: bool) -> None:
    """A model with one input of numbers takes them under any name, and converts what FP32 can hold."""
    if datatype == "FP16" and not binary:
        pytest.skip("the protocol has no FP16 as JSON")
    row = np.array([[1.0, 2.0]], np.float32)
    tensor = triton.InferInput("input-0", [1, 2], datatype)
    tensor.set_data_from_numpy(row.astype(triton_to_np_dtype(datatype)), binary_data=binary)
    expected = client.infer("compass", [build_input(row)]).as_numpy("probabilities")
    assert np.array_equal(client.infer("compass", [tensor]).as_numpy("probabilities"), expected)


def test_requests_that_clients_can_get_wrong(client: Any) -> None:
    """What the client lets through and the model does not take is an exception with our sentence."""
    row = np.array([[1.0, 2.0]], np.float32)
    outputs = [triton.InferRequestedOutput("label"), triton.InferRequestedOutput("label")]
    flags = triton.InferInput("inputs", [1, 2], "BOOL")
    flags.set_data_from_numpy(row > 0)
    for inputs, wanted, sentence in (
        ([build_input(row)], outputs, "a second time"),
        ([build_input(row)], [triton.InferRequestedOutput("nosuch")], "the model gives outputs, prediction"),
        ([flags], None, "has datatype BOOL, the model takes FP32"),
        ([build_input(row), flags], None, "two inputs have the same name"),
        ([build_input(np.ones((1, 3), np.float32))], None, "has shape"),
        ([build_input(np.array([[np.nan, 1]], np.float32))], None, "not finite"),
    ):
        with pytest.raises(InferenceServerException, match=sentence) as caught:
            client.infer("compass", inputs, outputs=wanted)
        assert caught.value.status() == "400"
