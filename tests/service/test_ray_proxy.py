"""Tests of service.hosts.ray_proxy."""

from collections.abc import Iterator

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.hosts.ray_proxy import RayErrors, build_middlewares
from tests.asgi import Answer, Client

TEXT = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-request-id", b"n1")]
JSON = [(b"content-type", b"application/json"), (b"x-request-id", b"n1")]


def ask(*messages: Message, path: str = "/v1/models") -> Answer:
    """Return the response that a client gets when a server sends these messages."""

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    client = Client(RayErrors(server))
    try:
        return client.request("GET", path)
    finally:
        client.close()


def start(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    """Return the start of a response."""
    return {"type": "http.response.start", "status": status, "headers": headers}


def parts(*bodies: bytes) -> Iterator[Message]:
    """Return a body in several messages."""
    for number, body in enumerate(bodies):
        yield {"type": "http.response.body", "body": body, "more_body": number < len(bodies) - 1}


@pytest.mark.parametrize(("rays", "ours"), [(408, 504), (500, 503), (503, 503)])
def test_errors_of_ray_become_ours(rays: int, ours: int) -> None:
    """Plain text becomes JSON with our status and headers; the request id is kept."""
    answer = ask(start(rays, TEXT), *parts(b"Request dropped ", b"due to backpressure"))
    assert (answer.status, list(answer.json())) == (ours, ["error"])
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] == "n1"
    assert answer.headers.get("retry-after") == ("1" if ours == 503 else None)
    assert int(answer.headers["content-length"]) == len(answer.body)


@pytest.mark.parametrize("status", [200, 404, 500, 503, 504])
def test_our_own_responses_pass_unchanged(status: int) -> None:
    """Responses of the application are not touched."""
    answer = ask(start(status, JSON), *parts(b'{"error"', b': "mine"}'))
    assert (answer.status, answer.json()) == (status, {"error": "mine"})


def test_no_response_becomes_503() -> None:
    """If the replica died before it responded, the client is told to retry."""
    answer = ask()
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")


def test_health_checks_of_ray_pass_unchanged() -> None:
    """Ray's own paths are not touched."""
    answer = ask(start(503, TEXT), *parts(b"DRAINING"), path="/-/healthz")
    assert (answer.status, answer.body) == (503, b"DRAINING")


def test_ray_gets_one_middleware() -> None:
    """The function that Ray calls returns Starlette middlewares."""
    (middleware,) = build_middlewares()
    assert repr(middleware) == "Middleware(RayErrors)"
