"""Which web pages and host names may call the service, and what content types it reads, without a server."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.api.access import restrict_hosts
from service.app import create_app
from service.settings import Settings
from tests.asgi import Answer, Client

PREDICT = "/v1/models/doubler:predict"
INDEX = "/v2/repository/index"
BODY = b'{"instances": [[2]]}'
ALLOWED = "https://shop.example"
Open = Callable[..., Client]


@pytest.fixture
def open_client(models_dir: Path) -> Iterator[Open]:
    """Open an application with settings of the test's own."""
    clients: list[Client] = []

    def open_one(**more: str) -> Client:
        settings = Settings(models_dir=models_dir, device="cpu", backend="onnx", **more)  # type: ignore[arg-type]
        clients.append(Client(create_app(restrict_hosts(settings) if more.pop("host", "") else settings)))
        return clients[-1]

    yield open_one
    for client in clients:
        client.close()


def send(client: Client, path: str, **fields: str) -> Answer:
    """Send a POST that both kinds of paths answer."""
    named = [(name.replace("_", "-"), value) for name, value in fields.items()]
    return client.request("POST", path, BODY if path == PREDICT else b"", named)


@pytest.mark.parametrize("path", [PREDICT, INDEX])
def test_pages_of_other_sites_are_refused(path: str, open_client: Open) -> None:
    """A page may call the service that it came from; one of any other site, or of a file, may not."""
    client = open_client()
    for origin in ("https://evil.example", "null", "http://here:8001", "http://here.evil:8000"):
        answer = send(client, path, host="here:8000", origin=origin)
        assert (answer.status, list(answer.json())) == (403, ["error"])
        assert "--cors-origin" in answer.json()["error"]
        assert "access-control-allow-origin" not in answer.headers
    for fields in (
        {},
        {"origin": "http://here:8000"},
        {"origin": "https://HERE:8000"},
        {"origin": "https://outside.example", "sec_fetch_site": "same-origin"},  # a proxy has changed the host
    ):
        assert send(client, path, host="here:8000", **fields).status == 200
    assert client.request("GET", "/v2", headers=[("Origin", "https://evil.example")]).status == 200  # but not readable


@pytest.mark.parametrize("path", [PREDICT, INDEX])
def test_pages_of_allowed_origins_may_call(path: str, open_client: Open) -> None:
    """An allowed origin gets the headers that let its pages read responses, failures too, and send JSON."""
    client = open_client(cors_origin=f"https://other.example, {ALLOWED}/", api_key="secret")
    asked = client.request("OPTIONS", path, headers=[("Origin", ALLOWED), ("Access-Control-Request-Method", "POST")])
    assert (asked.status, asked.body) == (200, b"")
    assert asked.headers["access-control-allow-methods"] == "GET, POST"
    assert "authorization" in asked.headers["access-control-allow-headers"]
    for key, status in (("secret", 200), ("", 401)):
        answer = send(client, path, origin=ALLOWED, x_api_key=key)
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (status, ALLOWED)
        assert answer.headers["vary"] == "origin"
    assert send(client, path, origin="https://evil.example", x_api_key="secret").status == 403
    assert client.request("OPTIONS", path, headers=[("Origin", "https://evil.example")]).status == 403
    assert send(open_client(cors_origin="*"), path, origin="https://any.example").status == 200


def test_hosts_are_those_of_the_loopback_address(open_client: Open) -> None:
    """A name that somebody makes resolve to this machine is refused, on every path; more names can be allowed."""
    client = open_client(host="127.0.0.1")
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]:8000", "[::1]", ""):
        for _ in range(2):
            assert send(client, PREDICT, host=host).status == 200
            assert send(client, INDEX, host=host).status == 200
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example:80"):
        for method, path in (("POST", PREDICT), ("POST", INDEX), ("GET", "/v1/models"), ("GET", "/health/live")):
            answer = client.request(method, path, BODY if path == PREDICT else b"", [("Host", host)])
            assert answer.status == 403
            assert "--allowed-hosts" in answer.json()["error"]
    assert send(open_client(), PREDICT, host="any.example").status == 200
    assert send(open_client(host="127.0.0.1", allowed_hosts="*"), PREDICT, host="any.example").status == 200
    named = open_client(host="127.0.0.1", allowed_hosts="models.example")
    assert [send(named, PREDICT, host=host).status for host in ("models.example:80", "localhost")] == [200, 403]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/x-www-form-urlencoded", 200),
        ("application/x-www-form-urlencoded; charset=utf-8", 200),
        ("application/vnd.kserve+json", 200),
        ("application/problem+json; charset=utf-8", 200),
        ("text/plain", 415),
        ("application/xml", 415),
        ("text/x+json", 415),
    ],
)
def test_json_under_other_names(kind: str, status: int, open_client: Open) -> None:
    """JSON as `curl -d` sends it is read, and as a kind of JSON; other content types are not."""
    client = open_client()
    assert send(client, PREDICT, content_type=kind).status == status
    infer = b'{"inputs": [{"name": "inputs", "shape": [1, 1], "datatype": "FP32", "data": [2]}]}'
    assert client.request("POST", "/v2/models/doubler/infer", infer, [("Content-Type", kind)]).status == status


def test_root_is_a_page_for_browsers_and_json_for_probes(open_client: Open) -> None:
    """KServe's liveness probe gets JSON; what names HTML gets the page."""
    client = open_client()
    for accept in ([], [("Accept", "*/*")], [("Accept", "application/json")]):
        answer = client.request("GET", "/", headers=accept)
        assert (answer.status, answer.json(), answer.headers["vary"]) == (200, {"status": "alive"}, "Accept")
    page = client.request("GET", "/", headers=[("Accept", "text/html,application/xhtml+xml,*/*;q=0.8")])
    assert page.body.startswith(b"<!doctype html>")
