"""Tests of service.request: a prediction driven by hand, without any transport."""

import asyncio
import gzip
import json
import pkgutil
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.api.headers import PredictRoute, RequestHeaders, match_route
from service.api.limits import ReadLimits
from service.api.responses import Response
from service.api.v1.decode import Call
from service.app import Application, create_app
from service.errors import ClientClosedError, DeadlineExceededError, UnavailableError
from service.model.backends import Array
from service.request import LARGE_OUTPUTS, PredictRequest
from service.settings import Settings
from service.telemetry.recorder import BATCH

GOOD = b'{"instances": [[2.0]]}'
PREDICT = "/v1/models/doubler:predict"
JSON = RequestHeaders(b"id-1", content_type=b"application/json")
Drive = Callable[[PredictRequest], None]


@pytest.fixture
def app(doubler_dir: Path) -> Application:
    """An application on one model."""
    return create_app(Settings(models_dir=doubler_dir, device="cpu", max_request_bytes=1024))


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
    assert (response.status, response.closes, b"secret" in response.body) == (500, False, False)


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


def is_all_given_back(app: Application) -> bool:
    """Tell whether nothing counts as held: the whole budget is free, and no more than that."""
    budget = 256 * 2**20
    app.context.reserve(0, budget)
    with pytest.raises(UnavailableError):
        app.context.reserve(0, 1)
    return app.context.reserve(budget, 0) == 0


def test_worker_is_pressed_above_half_of_its_budget(app: Application) -> None:
    """Patience with clients that read nothing ends once more than half of the budget is held."""
    context, half = app.context, 128 * 2**20
    context.reserve(0, half)
    assert not context.is_pressed
    context.reserve(half, half + 1)
    assert context.is_pressed


@pytest.mark.parametrize("size", [1, 2000])
def test_rest_of_a_refused_request_is_ignored(size: int, app: Application) -> None:
    """What comes of a body after its request was refused is neither held nor answered again."""
    (response,) = run(app, send("/v1/models/nosuch:predict", b" " * size, GOOD))
    assert response.status == 404
    assert is_all_given_back(app)


@pytest.mark.parametrize(
    ("path", "timeout"),
    [("/v1/models/doubler:predict", b"2.5"), ("/v2/models/doubler/infer", b""), ("/v2/models/doubler/infer", b"2")],
    ids=["header", "body", "both"],
)
@pytest.mark.parametrize("coding", [b"", b"gzip"])
def test_request_chooses_its_deadline(path: str, timeout: bytes, coding: bytes, app: Application) -> None:
    """The shorter of the times that a request asks for holds, wherever its body is decoded."""
    body = GOOD
    if path.startswith("/v2"):
        tensor = {"name": "inputs", "datatype": "FP32", "shape": [1, 1], "data": [2.0]}
        body = json.dumps({"inputs": [tensor], "parameters": {"timeout": 2_500_000}}).encode()
    begun: list[tuple[PredictRequest, float]] = []

    def drive(request: PredictRequest) -> None:
        begun.append((request, asyncio.get_running_loop().time()))
        headers = JSON._replace(timeout=timeout, content_encoding=coding)
        send(path, gzip.compress(body) if coding else body, headers=headers)(request)

    assert run(app, drive)[0].status == 200
    request, began = begun[0]
    shortest = float(timeout or b"2.5")
    assert shortest <= request.deadline - began < shortest + 5


@pytest.mark.parametrize("action", ["predict", "preview"])
def test_inputs_count_as_held(action: str, app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short body with inputs that would take more memory than is left is refused, and holds nothing after."""
    inputs = np.broadcast_to(np.float32(0), (300 * 2**18, 1))
    monkeypatch.setattr("service.api.v1.decode.decode", lambda *_: Call(inputs))
    headers = JSON._replace(content_encoding=b"gzip")
    (response,) = run(app, send(f"/v1/models/doubler:{action}", gzip.compress(GOOD), headers=headers))
    assert response.status == 503
    assert is_all_given_back(app)


def test_outputs_count_as_held(app: Application) -> None:
    """Outputs that would take more memory than is left are refused."""

    def drive(request: PredictRequest) -> None:
        request.start("POST", route_of(PREDICT), JSON)
        request.set_result(np.broadcast_to(np.float32(0), (300 * 2**18, 1)))

    (response,) = run(app, drive)
    assert response.status == 503
    assert is_all_given_back(app)


@pytest.mark.parametrize("action", ["predict", "preview"])
@pytest.mark.parametrize("stage", ["decode", "encode"])
def test_client_that_goes_while_a_thread_works(
    action: str, stage: str, app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a thread returns after the client has gone is dropped: nothing is held, run or answered for it."""
    gone = threading.Event()
    give_up: list[Callable[[], object]] = []
    module = {"decode": "decode.decode", "encode": "encode.encode_preview" if action == "preview" else "encode.encode"}
    target = f"service.api.v1.{module[stage]}"
    work = pkgutil.resolve_name(target)

    def work_late(*arguments: object) -> object:
        result = work(*arguments)
        give_up[0]()
        assert gone.wait(10)
        return result

    monkeypatch.setattr(target, work_late)
    if stage == "encode":
        monkeypatch.setattr("service.request.LARGE_OUTPUTS", 0)
    requests: list[PredictRequest] = []

    def drive(request: PredictRequest) -> None:
        def cancel() -> None:
            request.cancel(ClientClosedError("gone"))
            gone.set()

        requests.append(request)
        loop = asyncio.get_running_loop()
        give_up.append(lambda: loop.call_soon_threadsafe(cancel))
        headers = JSON._replace(content_encoding=b"gzip")
        send(f"/v1/models/doubler:{action}", gzip.compress(GOOD), headers=headers)(request)

    assert run(app, drive) == []
    assert [answered.status for answered in app.recorder.answered] == [499]
    assert is_all_given_back(app)
    version = app.context.registry.get("doubler", None)
    assert version.batcher.rows == 0


def test_result_after_the_answer_is_ignored(app: Application) -> None:
    """A batcher that is too late with outputs, small or large, changes nothing."""

    def drive(request: PredictRequest) -> None:
        send("/v1/models/nosuch:predict", GOOD)(request)
        for rows in (1, LARGE_OUTPUTS):
            request.set_result(np.zeros((rows, 1), np.float32))
        request.set_exception(ValueError("late"))

    assert [response.status for response in run(app, drive)] == [404]
    assert is_all_given_back(app)


def test_preview_of_too_many_instances_is_refused(doubler_dir: Path) -> None:
    """A preview takes as many instances as a prediction, also as one tensor."""
    app = create_app(Settings(models_dir=doubler_dir, device="cpu", queue_size=2))
    for count, status in ((2, 200), (3, 413)):
        body = json.dumps({"instances": [[1.0]] * count}).encode()
        assert run(app, send("/v1/models/doubler:preview", body))[0].status == status


def test_trace_context_is_repeated(app: Application) -> None:
    """The response to a traced request carries its trace context, and its request id all the same."""
    trace = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    (response,) = run(app, send(PREDICT, GOOD, headers=JSON._replace(trace=trace)))
    assert b"traceparent: " + trace in response.fields
    assert b"x-request-id: id-1\r\n" in response.fields
    assert app.recorder.answered[0].trace == trace


def test_many_requests_in_one_turn_are_written(app: Application) -> None:
    """What was answered is recorded before much of it has gathered, however busy the worker is."""

    async def go() -> None:
        for count in range(1, BATCH + 2):
            request = PredictRequest(app.context, lambda response: None)
            send("/v1/models/nosuch:predict", GOOD)(request)
            assert len(app.recorder.answered) == count % BATCH

    asyncio.run(go())


@pytest.mark.parametrize("cut", [0, 10])
def test_body_may_be_as_long_as_the_limit(cut: int, app: Application) -> None:
    """A body of exactly the limit is read, whether its length was told or not, and one byte more is refused."""
    body = GOOD.ljust(1024)
    for length in (0, 1024):
        headers = JSON._replace(content_length=length)
        assert run(app, send(PREDICT, body[:cut], body[cut:], headers=headers))[0].status == 200
    assert run(app, send(PREDICT, body[:cut], body[cut:] + b" "))[0].status == 413


def test_budget_fits_two_of_the_largest_bodies(doubler_dir: Path) -> None:
    """Where larger bodies are allowed than the usual budget fits, it grows with them."""
    largest = 200 * 2**20
    app = create_app(Settings(models_dir=doubler_dir, device="cpu", max_request_bytes=largest))
    assert app.context.reserve(0, 2 * largest) == 2 * largest
    with pytest.raises(UnavailableError):
        app.context.reserve(0, 1)


def test_request_that_takes_no_more_is_not_refused(app: Application) -> None:
    """While answers that nobody reads take the whole budget, a request keeps what it has, or takes less."""
    context = app.context
    held = context.reserve(0, 100)
    context.hold(0, 300 * 2**20)
    for size in (100, 50):
        held = context.reserve(held, size)
    with pytest.raises(UnavailableError):
        context.reserve(held, 51)


@pytest.mark.parametrize("is_answered", [True, False])
def test_request_keeps_no_more_than_it_needs(is_answered: bool, app: Application) -> None:
    """A queued request no longer keeps its body, which is not copied; one that is answered keeps no version either."""
    body = bytes(bytearray(GOOD))
    version = app.context.registry.get("doubler", None)
    counts: list[tuple[int, int]] = []

    def drive(request: PredictRequest) -> None:
        counts.append((sys.getrefcount(body), sys.getrefcount(version)))
        request.start("POST", route_of(PREDICT), JSON)
        request.feed(body)
        assert sys.getrefcount(body) == counts[0][0] + 1
        if is_answered:
            request.cancel(DeadlineExceededError("too late"))
        else:
            request.finish()
        assert sys.getrefcount(body) == counts[0][0]
        if is_answered:
            assert sys.getrefcount(version) == counts[0][1]

    assert len(run(app, drive)) == 1


def test_thread_that_is_late_is_not_waited_for(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose decoding has not ended by its deadline is answered 504 then, and the thread stops."""
    monkeypatch.setattr("service.api.v1.decode.decode", lambda *_: time.sleep(0.3))
    headers = JSON._replace(content_encoding=b"gzip", timeout=b"0.01")
    (response,) = run(app, send(PREDICT, gzip.compress(GOOD), headers=headers))
    assert (response.status, response.closes) == (504, False)
