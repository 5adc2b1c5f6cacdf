"""Tests of service.request: a prediction driven by hand, without any transport."""

import asyncio
import gzip
import json
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.api.headers import PredictRoute, RequestHeaders, match_route
from service.api.limits import ReadLimits
from service.api.responses import Response
from service.app import Application, create_app
from service.errors import ClientClosedError, DeadlineExceededError
from service.model.backends import Array
from service.request import LARGE_OUTPUTS, PredictRequest
from service.settings import Settings

GOOD = b'{"instances": [[2.0]]}'
PREDICT = "/v1/models/doubler:predict"
JSON = RequestHeaders(b"id-1", content_type=b"application/json")
Drive = Callable[[PredictRequest], None]


@pytest.fixture
def app(models_dir: Path) -> Application:
    """An application on the good models."""
    return create_app(Settings(models_dir=models_dir, device="cpu", max_request_bytes=1024))


def route_of(path: str) -> PredictRoute:
    """Return a path's route."""
    route = match_route(path)
    assert route is not None
    return route


def run(app: Application, drive: Drive) -> list[Response]:
    """Drive one request on an event loop, and return all that it responded."""
    responses: list[Response] = []

    async def go() -> None:
        request = PredictRequest(app.context, responses.append)
        drive(request)
        for _ in range(500):
            if request.answered:
                break
            await asyncio.sleep(0.01)
        assert request.answered
        await asyncio.sleep(0.02)  # nothing comes after the response

    asyncio.run(go())
    assert app.context.in_flight == 0
    return responses


def send(path: str, *chunks: bytes, headers: RequestHeaders = JSON, method: str = "POST") -> Drive:
    """Return how to drive a whole request."""

    def drive(request: PredictRequest) -> None:
        request.start(method, route_of(path), headers)
        for chunk in chunks:
            request.feed(chunk)
        request.finish()

    return drive


@pytest.mark.parametrize("chunks", [(GOOD,), (GOOD[:3], GOOD[3:]), (b"", GOOD, b"")])
def test_prediction_is_answered_once(chunks: tuple[bytes, ...], app: Application) -> None:
    """However its body comes, a prediction gets one response, with its request id, and is recorded."""
    (response,) = run(app, send(PREDICT, *chunks))
    assert response.status == 200
    assert b"x-request-id: id-1\r\n" in response.fields
    assert json.loads(response.body)["predictions"] == [{"prediction": 5.0}]
    (answered,) = app.recorder.answered
    assert (answered.status, answered.rows, answered.path, answered.error) == (200, 1, PREDICT, "")
    assert answered.metrics is not None
    assert answered.metrics.model == "doubler/2"


@pytest.mark.parametrize(
    ("drive", "status", "closes"),
    [
        (send(PREDICT, b"{}"), 400, False),
        (send("/v1/models/nosuch:predict", GOOD), 404, False),
        (send(PREDICT, GOOD, method="PUT"), 405, False),
        (send(PREDICT, GOOD, headers=JSON._replace(content_length=1025)), 413, True),
        (send(PREDICT, b" " * 600, b" " * 600, GOOD), 413, True),
        (send(PREDICT, GOOD, headers=JSON._replace(content_type=b"text/plain")), 415, False),
        (send(PREDICT, GOOD, headers=JSON._replace(content_encoding=b"gzip")), 400, False),
    ],
    ids=["body", "model", "method", "length", "chunks", "media type", "coding"],
)
def test_refused_prediction_is_answered_once(drive: Drive, status: int, closes: bool, app: Application) -> None:
    """A refusal is one response; only a body that is not worth reading asks for the end of the connection."""
    (response,) = run(app, drive)
    assert (response.status, response.closes) == (status, closes)
    assert list(json.loads(response.body)) == ["error"]
    assert [answered.status for answered in app.recorder.answered] == [status]


def test_heavy_body_is_decoded_off_the_loop(app: Application) -> None:
    """A compressed body is decoded in a thread, and answered as any other."""
    headers = JSON._replace(content_encoding=b"gzip")
    (response,) = run(app, send(PREDICT, gzip.compress(GOOD), headers=headers))
    assert json.loads(response.body)["predictions"] == [{"prediction": 5.0}]


def test_preview_shows_the_instances(app: Application) -> None:
    """A preview responds with the instances, and no backend runs."""
    (response,) = run(app, send("/v1/models/doubler:preview", GOOD))
    assert json.loads(response.body) == {"model": "doubler", "version": 2, "instances": [[2.0]]}
    (answered,) = app.recorder.answered
    assert not answered.is_prediction


@pytest.mark.parametrize("parts", [(), (GOOD[:5],), (GOOD,)], ids=["head", "half", "whole"])
def test_client_that_has_gone_gets_nothing(parts: tuple[bytes, ...], app: Application) -> None:
    """A request given up because its client has gone responds with nothing, and is recorded once, as 499."""

    def drive(request: PredictRequest) -> None:
        request.start("POST", route_of(PREDICT), JSON)
        for part in parts:
            request.feed(part)
        if parts == (GOOD,):
            request.finish()
        request.cancel(ClientClosedError("gone"))
        request.cancel(ClientClosedError("gone twice"))

    assert run(app, drive) == []
    assert [answered.status for answered in app.recorder.answered] == [499]


def test_cancelled_request_is_answered_with_the_reason(app: Application) -> None:
    """A request that is given up for its deadline responds with that, and ignores its result."""

    def drive(request: PredictRequest) -> None:
        request.start("POST", route_of(PREDICT), JSON)
        request.finish(GOOD)
        request.cancel(DeadlineExceededError("too late"))

    (response,) = run(app, drive)
    assert (response.status, response.closes, json.loads(response.body)) == (504, True, {"error": "too late"})


def test_failure_to_encode_is_an_answer(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure while the response is built is a 500 without internals, and does not reach the batcher."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr("service.api.v1.encode.build_predictions", fail)
    (response,) = run(app, send(PREDICT, GOOD))
    assert (response.status, b"secret" in response.body) == (500, False)


def test_memory_budget_is_given_back(app: Application) -> None:
    """What requests hold is counted while they hold it, and no longer."""
    context = app.context
    context.reserve(0, 256 * 2**20)
    (response,) = run(app, send(PREDICT, GOOD))
    assert (response.status, response.closes) == (503, True)
    context.reserve(256 * 2**20, 0)
    for _ in range(3):
        assert run(app, send(PREDICT, GOOD))[0].status == 200
    assert context.reserve(0, 256 * 2**20) == 256 * 2**20


def test_reading_ends_when_the_client_goes(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that reads a body stops between two pieces once its request is given up."""
    pieces: list[int] = []
    give_up: list[Callable[[], object]] = []

    def decode(body: bytes, manifest: object, headers: object, limits: ReadLimits) -> None:
        for piece in range(2):
            limits.check()
            pieces.append(piece)
            give_up[0]()

    monkeypatch.setattr("service.api.v1.decode.decode", decode)

    def drive(request: PredictRequest) -> None:
        loop = asyncio.get_running_loop()
        is_given_up = threading.Event()

        def cancel() -> None:
            request.cancel(ClientClosedError("gone"))
            is_given_up.set()

        give_up.append(lambda: (loop.call_soon_threadsafe(cancel), is_given_up.wait(10)))
        send(PREDICT, gzip.compress(GOOD), headers=JSON._replace(content_encoding=b"gzip"))(request)

    assert run(app, drive) == []
    assert pieces == [0]


def test_large_outputs_are_encoded_off_the_loop(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that take long to write are written, and compressed, in a thread, and count as held meanwhile."""
    threads: list[str] = []

    def encode(outputs: Array, *_: object) -> tuple[bytes, bytes]:
        threads.append(threading.current_thread().name)
        return b"", b"x" * len(outputs)

    monkeypatch.setattr("service.api.v1.encode.encode", encode)
    for rows in (1, LARGE_OUTPUTS):

        def drive(request: PredictRequest, rows: int = rows) -> None:
            request.start("POST", route_of(PREDICT), JSON._replace(accept_encoding=b"gzip"))
            request.set_result(np.zeros((rows, 1), np.float32))

        (response,) = run(app, drive)
        assert (response.status, len(response.body) < 2**14) == (200, True)
    assert threads[0] == "MainThread"
    assert threads[1].startswith("read")


def test_answers_that_are_not_sent_count_as_held(app: Application) -> None:
    """What waits for a client to read it takes the room of further bodies, until it is sent."""
    context = app.context
    seen = []
    for size in (300 * 2**20, 0):
        held = context.hold(0, size)
        seen.append((context.is_pressed, run(app, send(PREDICT, GOOD))[0].status))
        context.hold(held, 0)
    assert seen == [(True, 503), (False, 200)]


def test_body_in_many_parts_is_kept_as_one(app: Application) -> None:
    """A body that comes in parts of two bytes takes about its size."""

    def drive(request: PredictRequest) -> None:
        request.start("POST", route_of(PREDICT), JSON)
        tracemalloc.start()
        for _ in range(500):
            request.feed(b"".join((b" ", b" ")))
        assert tracemalloc.get_traced_memory()[0] < 8000
        tracemalloc.stop()
        request.finish(GOOD)

    assert run(app, drive)[0].status == 200
