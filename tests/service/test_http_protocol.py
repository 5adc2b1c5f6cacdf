"""Tests of service.http: a connection on a real socket, but in this process, so that its timeouts can be set."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.app import create_app
from service.hosts.litserve import open_listener
from service.http.server import HttpServer
from service.settings import Settings
from tests.fuzz.connection import converse
from tests.wire import Wire, build_predict, build_request


@pytest.fixture
def url(models_dir: Path) -> Iterator[str]:
    """The address of a server that keeps an idle connection for a second."""
    app = create_app(Settings(models_dir=models_dir))
    with open_listener("127.0.0.1", 0) as listener:
        server = HttpServer(app, listener, lambda: None, keep_alive=1)
        thread = threading.Thread(target=server.run)
        thread.start()
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.handle_exit(0, None)
        thread.join()


REQUESTS = {"a prediction": build_predict("doubler", [1.0]), "another": build_request("/v1/models", None, method="GET")}


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("more", [b"", b"\r\n"], ids=["silence", "a blank line"])
def test_idle_connection_is_closed(kind: str, more: bytes, url: str) -> None:
    """A client that sends no further request is let go, also when it sends what begins none."""
    with Wire(url, 10) as wire:
        assert wire.send(REQUESTS[kind]).read().status == 200
        began = time.monotonic()
        assert wire.send(more).is_closed()
        assert 0.9 < time.monotonic() - began < 5


def test_http_1_0_stays_open_for_those_who_ask() -> None:
    """`ab -k` sends HTTP/1.0 and asks to keep the connection; without that, its response is the last."""
    fields = b"Connection: Keep-Alive\r\nHost: x\r\nUser-Agent: ApacheBench/2.3\r\nContent-type: application/json"
    body = b'{"instances": [[1]]}'
    head = b"POST /v1/models/doubler:predict HTTP/1.0\r\n%b\r\nContent-length: %d\r\n\r\n" % (fields, len(body))
    written, end = converse([head + body] * 3, False)
    assert (written.count(b"HTTP/1.1 200 OK"), written.count(b"connection: keep-alive\r\n"), end) == (3, 3, "usable")
    closing = (head + body).replace(b"Connection: Keep-Alive\r\n", b"")
    written, end = converse([closing, head + body], False)
    assert (written.count(b"HTTP/1.1 200 OK"), written.count(b"connection: close\r\n"), end) == (1, 1, "closed")
