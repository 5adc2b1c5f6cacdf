"""Triton's gRPC client, unchanged: sync, asyncio, and streams."""

import asyncio
import queue
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from PIL import Image
from tritonclient.utils import InferenceServerException

from service.runtime_folder import find_access
from tests import fakes
from tests.contract.clients.grpc_server import GrpcServer
from tests.wire import napper, rounds_for, wait_until

SECONDS = 60
SLOW = napper(least=rounds_for(0.02))
ROWS = np.array([[0, 3], [5, 0], [0, -2]], np.float32)
LABELS = np.array([b"north", b"east", b"south", b"west"], object)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcServer]:
    """A server with one model of each task, and a slow one."""
    root = tmp_path_factory.mktemp("grpc") / "models"
    for fake in (*(build() for build in fakes.GOOD), fakes.doubler(version=2, factor=2.5), SLOW):
        fakes.write_version(root, fake)
    with GrpcServer(root, "--workers", "1") as running:
        yield running


@pytest.fixture
def client(server: GrpcServer) -> Iterator[Any]:
    """Triton's client."""
    with triton.InferenceServerClient(server.address) as made:
        yield made


def build_input(rows: Any, module: Any = triton) -> Any:
    """Return the client's input tensor."""
    tensor = module.InferInput("inputs", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    return tensor


def check_compass(result: Any, rows: Any = ROWS) -> None:
    """Check every output of `compass` for rows."""
    logits = rows @ fakes.COMPASS_WEIGHTS
    assert [output.name for output in result.get_response().outputs] == [
        "outputs",
        "prediction",
        "probabilities",
        "label",
    ]
    np.testing.assert_array_equal(result.as_numpy("outputs"), logits)
    np.testing.assert_array_equal(result.as_numpy("prediction"), logits.argmax(axis=1))
    assert result.as_numpy("probabilities").sum(axis=1) == pytest.approx(1)
    assert result.as_numpy("label").tolist() == LABELS[logits.argmax(axis=1)].tolist()


def test_what_the_server_says_of_itself(client: Any) -> None:
    """Health, metadata, configuration, statistics and index."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("compass")
    assert client.is_model_ready("doubler", "1")
    assert not client.is_model_ready("nosuch")
    assert not client.is_model_ready("doubler", "9")
    assert "statistics" in client.get_server_metadata().extensions
    metadata = client.get_model_metadata("doubler", as_json=True)
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("doubler", ["1", "2"], "onnx_onnxv1")
    assert metadata["inputs"] == [{"name": "inputs", "datatype": "FP32", "shape": ["-1", "1"]}]
    config = client.get_model_config("doubler").config
    assert (config.name, config.max_batch_size, config.backend) == ("doubler", 64, "onnxruntime")
    assert config.input[0].data_type == 11  # TYPE_FP32
    index = client.get_model_repository_index().models
    assert {("doubler", "1", "READY"), ("doubler", "2", "READY")} <= {
        (row.name, row.version, row.state) for row in index
    }


def test_statistics_count(client: Any) -> None:
    """Answered requests and rows are counted as over HTTP."""

    def count() -> tuple[int, int]:
        (row,) = client.get_inference_statistics("switch", "1").model_stats
        return row.inference_stats.success.count, row.inference_count

    before = count()
    for _ in range(3):
        client.infer("switch", [build_input(np.ones((2, 1), np.float32))])
    wait_until(lambda: count() == (before[0] + 3, before[1] + 6))
    assert len(client.get_inference_statistics().model_stats) > 1


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_infer(compression: str | None, client: Any) -> None:
    """All outputs, to the bit, also compressed."""
    rows = np.random.default_rng(0).normal(0, 3, (2000, 2)).astype(np.float32)
    for sent in (ROWS, rows):
        result = client.infer("compass", [build_input(sent)], request_id="7", compression_algorithm=compression)
        check_compass(result, sent)
        assert result.get_response().id == "7"


def test_outputs_versions_and_classes(client: Any) -> None:
    """Outputs that are asked for, in that order; a version; and the classification extension."""
    wanted = [triton.InferRequestedOutput("label"), triton.InferRequestedOutput("probabilities", class_count=2)]
    result = client.infer("compass", [build_input(ROWS[:2])], outputs=wanted)
    assert [output.name for output in result.get_response().outputs] == ["label", "probabilities"]
    classes = result.as_numpy("probabilities")
    assert [text.decode().split(":")[1:] for text in classes[:, 0]] == [["0", "north"], ["1", "east"]]
    for version, expected in (("", 5.0), ("1", 4.0), ("2", 5.0)):
        result = client.infer("doubler", [build_input(np.array([[2.0]], np.float32))], model_version=version)
        assert result.as_numpy("outputs").tolist() == [[expected]]
        assert result.get_response().model_version == (version or "2")


@pytest.mark.parametrize(
    ("ask", "status", "sentence"),
    [
        (
            lambda client: client.infer("nosuch", [build_input(ROWS)]),
            "NOT_FOUND",
            "Request for unknown model: 'nosuch'",
        ),
        (lambda client: client.get_model_metadata("nosuch"), "NOT_FOUND", "Request for unknown model: 'nosuch'"),
        (lambda client: client.get_model_config("nosuch/x"), "NOT_FOUND", "Request for unknown model: 'nosuch/x'"),
        (lambda client: client.get_model_metadata(""), "INVALID_ARGUMENT", "the request names no model"),
        (lambda client: client.infer("compass", [build_input(ROWS[:, :1])]), "INVALID_ARGUMENT", "has shape"),
        (lambda client: client.infer("compass", [build_input(ROWS / 0)]), "INVALID_ARGUMENT", "not finite"),
        (lambda client: client.load_model("compass"), "UNAUTHENTICATED", "only the command line may change"),
        (lambda client: client.get_system_shared_memory_status(), "UNIMPLEMENTED", ""),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_errors_have_a_code_and_our_sentence(
    ask: Callable[[Any], Any], status: str, sentence: str, client: Any
) -> None:
    """Every failure is an exception with the code that belongs to HTTP's status, and the same sentence."""
    with pytest.raises(InferenceServerException) as caught:
        ask(client)
    assert caught.value.status() == f"StatusCode.{status}"
    assert sentence in caught.value.message()


def test_load_and_unload_with_the_key(client: Any, server: GrpcServer) -> None:
    """Who may change what is served over HTTP may so here, by the same key as metadata."""
    access = find_access(server.url)
    assert access is not None
    for name, headers in (("x-api-key", access.token), ("authorization", f"Bearer {access.token}")):
        client.unload_model("canvas", headers={name: headers})
        assert not client.is_model_ready("canvas")
        client.load_model("canvas", headers={name: headers})
        assert client.is_model_ready("canvas")
    with pytest.raises(InferenceServerException, match="put them into the folder"):
        client.load_model("canvas", headers={"x-api-key": access.token}, config="{}")


def test_client_timeout_and_cancellation(client: Any, server: GrpcServer) -> None:
    """A deadline ends a request on the server, too, as does a client that cancels; both are logged."""
    slow = build_input(np.array([[rounds_for(1.5)]], np.float32))
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        client.infer("napper", [slow], client_timeout=0.2)
    wait_until(lambda: "ModelInfer 504" in server.log())
    client.infer("napper", [build_input(np.zeros((1, 1), np.float32))])  # waits until the model is free
    with pytest.raises(InferenceServerException, match="no answer was ready by the request's deadline"):
        client.infer("napper", [slow], timeout=500_000)
    client.infer("napper", [build_input(np.zeros((1, 1), np.float32))])
    failures: queue.Queue[Any] = queue.Queue()
    context = client.async_infer("napper", [slow], lambda result, error: failures.put(error))
    wait_until(lambda: "service_requests_in_flight 1.0" in server.get("/metrics").text)
    context.cancel()
    assert "CANCELLED" in str(failures.get(timeout=SECONDS))
    wait_until(lambda: "ModelInfer 499" in server.log())


def test_async_infer(client: Any) -> None:
    """Many requests at a time through the client's callbacks."""
    results: queue.Queue[Any] = queue.Queue()
    for _ in range(50):
        client.async_infer("compass", [build_input(ROWS)], lambda result, error: results.put(error or result))
    for _ in range(50):
        check_compass(results.get(timeout=SECONDS))


def test_stream(client: Any) -> None:
    """Requests of a stream are answered in order, and one that fails does not end it."""
    results: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: results.put(error or result))
    for index in range(200):
        rows = ROWS[:, :1] if index == 50 else ROWS
        client.async_stream_infer("compass", [build_input(rows)], request_id=str(index))
    for index in range(200):
        found = results.get(timeout=SECONDS)
        if index == 50:
            assert "has shape" in str(found)
            continue
        check_compass(found)
        response = found.get_response()
        assert (response.id, response.parameters["triton_final_response"].bool_param) == (str(index), True)
    client.stop_stream()


def test_asyncio_client(server: GrpcServer) -> None:
    """The asyncio client: requests side by side, and a stream."""

    async def send() -> Any:
        for _ in range(5):
            yield {"model_name": "compass", "inputs": [build_input(ROWS, triton_aio)]}

    async def run() -> None:
        async with triton_aio.InferenceServerClient(server.address) as client:
            assert await client.is_server_ready()
            results = await asyncio.gather(
                *(client.infer("compass", [build_input(ROWS, triton_aio)]) for _ in range(30))
            )
            for result in results:
                check_compass(result)
            answered = [answer async for answer in client.stream_infer(send())]
            assert [error for _, error in answered] == [None] * 5
            for result, _ in answered:
                check_compass(result)

    asyncio.run(run())


def test_pictures_as_bytes(client: Any) -> None:
    """An image model takes picture files as BYTES."""
    tensor = triton.InferInput("inputs", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([draw_picture()], object))
    result = client.infer("canvas", [tensor])
    assert result.as_numpy("prediction").shape == (1,)


def draw_picture() -> bytes:
    """Return a PNG of a dark stroke."""
    picture = Image.new("L", (28, 28), 255)
    picture.paste(0, (12, 4, 16, 24))
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
