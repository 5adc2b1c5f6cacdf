"""Tests of what `--cases medium` measures with: its clients, and the manifests of its models."""

import asyncio
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.clients import Pool, Response, build_request, run_closed, run_open
from benchmarks.medium import Overload
from benchmarks.medium_models import MODELS, MediumModel
from service.model.manifest import Manifest, TensorManifest

REQUEST = build_request("/", b"x" * 1_000_000, {})


class Server:
    """Answers each whole request by the next status; 0 hangs up. The response comes in two pieces."""

    def __init__(self, statuses: list[int]) -> None:
        self.statuses = iter(statuses)
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """End its thread."""
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._done = asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._done.wait()
        server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readexactly(len(REQUEST))
                if (status := next(self.statuses)) == 0:
                    break
                writer.write(f"HTTP/1.1 {status} Said\r\nContent-Length: 4\r\n\r\nab".encode())
                await asyncio.sleep(0.001)
                writer.write(b"cd")
        except asyncio.IncompleteReadError:
            pass
        writer.close()
        await writer.wait_closed()


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of the parameter's statuses."""
    server = Server(request.param)
    yield server
    server.stop()


@pytest.mark.parametrize("server", [[200, 503, 0] + [200] * 100_000], indirect=True)
def test_closed_loop_counts_what_fails_and_connects_again(server: Server) -> None:
    """A refused request and a broken connection are failures; the client goes on."""
    pool = Pool()
    run_closed(server.port, REQUEST, 1, 0.5, 0.0, pool)
    assert (pool.failed, pool.completed) == (2, len(pool.latencies))
    assert pool.completed > 2
    assert pool.percentile(50) >= 1


@pytest.mark.parametrize("server", [[200, 503, 0] + [504] * 17], indirect=True)
def test_open_loop_sends_whatever_the_responses(server: Server) -> None:
    """Every request has its response, also those that no server gave."""
    responses = run_open(server.port, REQUEST, 40, 0.5)
    statuses = [response.status for response in responses]
    assert sorted(statuses) == [0, 200, 503, *[504] * 17]
    assert all(response.milliseconds > 0 for response in responses)


def test_a_window_counts_whole_batches() -> None:
    """Three batches of eight, a second apart, are eight a second wherever the window cuts."""
    responses = [Response(0.0, float(batch), 200) for batch in range(6) for _ in range(8)]
    for start in (0.1, 0.5, 0.9):
        pool = Pool()
        pool.add(responses, start, start + 3.0)
        assert (pool.rate, pool.completed, pool.seconds) == (8.0, 24, 3.0)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_models_are_described_as_the_service_reads_them(model: MediumModel) -> None:
    """The manifest is valid, and says the inputs' shape and datatype."""
    manifest = model.describe(b"graph")
    inputs = model.build_inputs(2)
    if isinstance(manifest, Manifest):
        assert inputs.shape[1:] == manifest.input.shape
        assert inputs.dtype == np.float32
        assert manifest.output_width == 1000
    else:
        assert isinstance(manifest, TensorManifest)
        assert inputs.shape[1:] == manifest.inputs[0].shape[1:]
        assert inputs.dtype == np.int64


@pytest.mark.parametrize(("sent", "says"), [(40, "20/s"), (30, "15/s, all that the load generator can")])
def test_overload_says_where_the_load_generator_is_the_limit(sent: int, says: str) -> None:
    """What the service does with fewer requests than wanted is not what it does under that overload."""
    responses = [Response(0.0, 0.1 if number else 0.3, 200) for number in range(sent)]
    described = Overload(20.0, 2.0, 0.2, responses).describe()
    assert described["overload: sent of 20/s"] == says
    assert described["overload: accepted, late"].endswith("1 late, slowest 300 ms")
