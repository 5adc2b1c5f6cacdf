"""Tests of service.app, without a server: what the application does with each ASGI message."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from service.api.v1 import encode as v1_encode
from service.app import create_app
from service.errors import StartError
from service.model.backends import Array
from service.model.manifest import AnyManifest
from service.settings import Settings
from tests import fakes
from tests.asgi import Answer, Client, call

PREDICT = "/v1/models/doubler:predict"
GOOD = b'{"instances": [[2]]}'
Build = Callable[..., Client]


@pytest.fixture
def build(models_dir: Path) -> Iterator[Build]:
    """Build applications on the good models, each with a client, and end their loops afterwards."""
    built: list[Client] = []

    def build_one(**settings: Any) -> Client:
        built.append(
            Client(create_app(Settings.model_validate({"models_dir": models_dir, "device": "cpu"} | settings)))
        )
        return built[-1]

    yield build_one
    for client in built:
        client.close()


def assert_refused(answer: Answer, status: int, start: str) -> None:
    """Check an error answer: status, one sentence, a request id."""
    assert answer.status == status
    assert list(answer.json()) == ["error"]
    assert answer.json()["error"].startswith(start)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]


def test_prediction_is_answered(build: Build) -> None:
    """A good body is answered with the model, the version and a prediction per instance."""
    answer = build().request("POST", PREDICT, GOOD)
    assert answer.status == 200
    assert answer.json() == {"model": "doubler", "version": 2, "predictions": [{"prediction": 5.0}]}
    assert answer.headers["content-length"] == str(len(answer.body))


def test_body_may_come_in_pieces(build: Build) -> None:
    """A body in several messages is one body."""
    messages = [
        {"type": "http.request", "body": GOOD[i : i + 3], "more_body": i + 3 < len(GOOD)} for i in range(0, 20, 3)
    ]
    assert build().request("POST", PREDICT, messages).json()["predictions"] == [{"prediction": 5.0}]


def test_body_over_the_limit_is_refused_while_it_comes(build: Build) -> None:
    """413 as soon as the limit is passed, by the stated length or by what has come, and no later."""
    app = build(max_request_bytes=1024)
    sentence = "the body is over the limit of 1024 bytes"
    never = [{"type": "http.request", "body": b"", "more_body": True}]
    assert_refused(app.request("POST", PREDICT, never, [("Content-Length", "1025")]), 413, sentence)
    flood = [{"type": "http.request", "body": b"x" * 600, "more_body": True}] * 2
    assert_refused(app.request("POST", PREDICT, flood), 413, sentence)
    whole = b" " * (1024 - len(GOOD)) + GOOD
    assert app.request("POST", PREDICT, whole).status == 200
    assert_refused(app.request("POST", PREDICT, whole + b" "), 413, sentence)


def test_body_that_does_not_come_is_a_timeout(build: Build) -> None:
    """A client that stops half-way is answered 504 at the request's deadline."""
    app = build(request_timeout=0.05)
    half = [{"type": "http.request", "body": GOOD[:5], "more_body": True}]
    assert_refused(app.request("POST", PREDICT, half), 504, "the body did not arrive")


def test_client_that_goes_is_let_go(build: Build) -> None:
    """A connection closed half-way ends the request without a response, and without a stack in the log."""
    half: list[Message] = [{"type": "http.request", "body": GOOD[:5], "more_body": True}, {"type": "http.disconnect"}]
    assert build().request("POST", PREDICT, half).status == 0


def test_large_body_is_read_off_the_loop(build: Build) -> None:
    """A large body, read in a thread, is answered as a small one is."""
    rows = [[number / 1000] * 784 for number in range(1000)]
    answer = build().request("POST", "/v1/models/canvas:predict", json.dumps({"instances": rows}).encode())
    assert len(answer.json()["predictions"]) == 1000
    rows[-1][-1] = 2
    refused = build().request("POST", "/v1/models/canvas:predict", json.dumps({"instances": rows}).encode())
    assert_refused(refused, 400, "instances[999][783] is 2, outside [0, 1]")


def test_preview_is_written_off_the_loop(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """What shows many instances is encoded in a thread; more than it may show are a 413."""
    threads: list[str] = []
    encode = v1_encode.encode_preview

    def note_thread(inputs: Array, manifest: AnyManifest) -> tuple[bytes, bytes]:
        threads.append(threading.current_thread().name)
        return encode(inputs, manifest)

    monkeypatch.setattr(v1_encode, "encode_preview", note_thread)
    rows = [[number / 1000] * 784 for number in range(160)]
    answer = build().request("POST", "/v1/models/canvas:preview", json.dumps({"instances": rows}).encode())
    assert answer.json() == {"model": "canvas", "version": 1, "instances": rows}
    assert answer.headers["content-type"] == "application/json"
    assert threads[0].startswith("read")
    many = json.dumps({"instances": rows * 2}).encode()
    assert_refused(
        build().request("POST", "/v1/models/canvas:preview", many), 413, "the instances have 250880 numbers; a preview"
    )


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ([("Content-Type", "text/plain")], "content type text/plain is not read here; send Content-Type: application/"),
        ([("Content-Type", "application/xml")], "content type application/xml is not read here; send "),
        ([("Content-Encoding", "br")], "content encoding br is not read here; send "),
    ],
)
def test_other_media_are_refused(headers: list[tuple[str, str]], message: str, build: Build) -> None:
    """415 for what is not plain JSON."""
    assert_refused(build().request("POST", PREDICT, GOOD, headers), 415, message)


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", ""])
def test_json_is_read_whatever_its_spelling(kind: str, build: Build) -> None:
    """The content type's case and parameters do not matter, nor does its absence."""
    headers = [("Content-Type", kind)] if kind else []
    assert build().request("POST", PREDICT, GOOD, headers).status == 200


def test_keys_are_asked_for_where_they_are_set(build: Build) -> None:
    """With keys, everything but health needs one, in either header field; any of several will do."""
    app = build(api_key="first, second")
    for path, method in ((PREDICT, "POST"), ("/v1/models", "GET"), ("/openapi.json", "GET"), ("/nosuch", "GET")):
        missing = app.request(method, path, GOOD)
        assert_refused(missing, 401, "a key is needed; send it as X-API-Key")
        assert missing.headers["www-authenticate"] == "Bearer"
        assert_refused(app.request(method, path, GOOD, [("X-API-Key", "third")]), 401, "this key is not valid")
        assert_refused(app.request(method, path, GOOD, [("X-API-Key", "")]), 401, "a key is needed")
        for header in (("X-API-Key", "first"), ("X-API-Key", "second"), ("Authorization", "Bearer second")):
            assert app.request(method, path, GOOD, [header]).status == (404 if path == "/nosuch" else 200)
    assert app.request("GET", "/health/live").status == 200
    assert app.request("GET", "/health/ready").status == 200


def test_blank_key_lets_nobody_in(models_dir: Path) -> None:
    """Whatever the settings hold, a request without a key does not pass for one with a blank key."""
    settings = Settings(models_dir=models_dir, device="cpu", backend="onnx", api_key="caller")
    client = Client(create_app(settings.model_copy(update={"api_key": "caller, ", "admin_key": " "})))
    assert client.request("GET", "/v1/models").status == 401
    assert client.request("GET", "/v1/models", headers=[("X-API-Key", "")]).status == 401
    assert client.request("GET", "/v1/models", headers=[("X-API-Key", "caller")]).status == 200
    client.close()


def test_without_a_key_probes_tell_no_names(build: Build, empty_dir: Path) -> None:
    """Where keys are set, whoever sends none learns the status from a probe, and no model's name or reason."""
    fakes.write_version(empty_dir, fakes.doubler())
    fakes.write_version(empty_dir, fakes.liar())
    app = build(models_dir=empty_dir, api_key="first")
    known = [("X-API-Key", "first")]
    probes = {
        "/health/ready": (503, "not ready; send a key to see why"),
        "/v2/health/ready": (503, "not ready; send a key to see why"),
        "/v2/models/liar/ready": (503, "not ready; send a key to see why"),
        "/v2/models/nosuch/ready": (404, "there is no such model or version; send a key to see which there are"),
        "/v2/models/doubler/versions/9/ready": (
            404,
            "there is no such model or version; send a key to see which there are",
        ),
    }
    for path, (status, sentence) in probes.items():
        for headers in ([], [("X-API-Key", "wrong")]):
            answer = app.request("GET", path, headers=headers)
            assert (answer.status, answer.json()["error"]) == (status, sentence)
        answer = app.request("GET", path, headers=known)
        assert answer.status == status
        assert "liar" in answer.json()["error"] or "doubler" in answer.json()["error"]
    assert app.request("GET", "/v2/models/doubler/ready").json() == {"name": "doubler", "ready": True}
    assert app.request("GET", "/docs/nosuch").json()["error"].startswith("there is nothing at")


def test_request_id_is_echoed_or_made(build: Build) -> None:
    """A usable id comes back as it was; an unusable one is replaced; two requests never share one."""
    app = build()
    for path, method in ((PREDICT, "POST"), ("/v1/models", "GET"), ("/nosuch", "GET")):
        assert app.request(method, path, GOOD, [("X-Request-ID", "a-1/B:2=")]).headers["x-request-id"] == "a-1/B:2="
        made = {
            app.request(method, path, GOOD, [("X-Request-ID", bad)]).headers["x-request-id"]
            for bad in ("", "a b", "x" * 129)
        }
        assert len(made) == 3
        assert not made & {"", "a b", "x" * 129}


def test_ready_tells_of_models_that_do_not_serve(build: Build, empty_dir: Path) -> None:
    """Ready is 503 with a reason while a model that should serve does not, and 200 when all do; live is always 200."""
    assert build().request("GET", "/health/ready").json() == {"ready": True}
    fakes.write_version(empty_dir, fakes.doubler())
    fakes.write_version(empty_dir, fakes.liar())
    app = build(models_dir=empty_dir)
    ready = app.request("GET", "/health/ready")
    assert (ready.status, ready.json()["ready"]) == (503, False)
    assert ready.json()["error"].startswith("liar: its onnx graph")
    assert ready.headers["retry-after"] == "1"
    assert app.request("GET", "/health/live").json() == {"live": True}
    assert app.request("POST", PREDICT, GOOD).status == 200
    refused = app.request("POST", "/v1/models/liar:predict", GOOD)
    assert_refused(refused, 503, "model 'liar' is not ready")
    assert refused.headers["retry-after"] == "1"
    assert app.request("GET", "/v1/models/liar").json()["ready"] is False


def test_answer_that_is_not_finite_is_a_400(build: Build, empty_dir: Path) -> None:
    """A number that is not finite is never sent: the model has no answer for such values."""
    fakes.write_version(empty_dir, fakes.logarithm())
    app = build(models_dir=empty_dir)
    path = "/v1/models/logarithm:predict"
    assert_refused(
        app.request("POST", path, b'{"instances": [[-1]]}'), 400, "the model has no finite answer for these values"
    )


def test_full_queue_is_503_with_retry_after(build: Build) -> None:
    """Beyond the queue's rows a request is refused at once, and the others are answered."""
    client = build(queue_size=2)

    async def flood() -> list[Answer]:
        answers = await asyncio.gather(*(call(client.app, "POST", PREDICT, GOOD) for _ in range(5)))
        assert (await call(client.app, "POST", PREDICT, GOOD)).status == 200
        return list(answers)

    answers = client.run(flood())
    assert sorted(answer.status for answer in answers) == [200, 200, 503, 503, 503]
    full = next(answer for answer in answers if answer.status == 503)
    assert_refused(full, 503, "the model's queue is full")
    assert full.headers["retry-after"] == "1"


def test_missing_models_folder_is_a_start_error(tmp_path: Path) -> None:
    """An application on a folder that does not exist is not made."""
    with pytest.raises(StartError, match="does not exist"):
        create_app(Settings(models_dir=tmp_path / "nosuch"))


def test_path_prefix_of_a_proxy_is_taken_off(build: Build) -> None:
    """Behind a proxy that sets root_path, the paths are the same."""
    client = build()
    app = client.app

    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "root_path": "/api", "path": f"/api{scope['path']}"}, receive, send)

    client.app = mounted
    assert client.request("POST", PREDICT, GOOD).status == 200
    assert client.request("GET", "/v1/models").status == 200


@pytest.mark.parametrize("path", ["/metrics", "/v2/models/stats", "/v2/models/doubler/stats"])
def test_long_documents_are_made_in_a_thread(path: str, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of a thousand models take a second, which predictions do not wait for."""
    threads: list[int] = []

    def count(*_: str) -> dict[Any, float]:
        threads.append(threading.get_ident())
        return {}

    monkeypatch.setattr("service.telemetry.metrics.read_totals", count)
    monkeypatch.setattr("service.telemetry.metrics.render", lambda: bytes(count()))
    assert build().request("GET", path).status == 200
    assert len(threads) == 1
    assert threads != [threading.get_ident()]
