"""Good calls over real HTTP: every task, every way to write an instance, every parameter."""

import base64
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests

from tests import fakes
from tests.servers import Server


def predictions(answer: requests.Response) -> list[dict[str, Any]]:
    """Return the predictions of an answer that must be 200."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    body: dict[str, Any] = answer.json()
    assert list(body) == ["model", "version", "predictions"]
    found: list[dict[str, Any]] = body["predictions"]
    return found


def test_regression(server: Server) -> None:
    """A regression answers numbers, of lists and of objects alike, in the order of the instances."""
    assert predictions(server.predict("doubler", [[2], {"x": -0.5}, [0]])) == [
        {"prediction": 5.0},
        {"prediction": -1.25},
        {"prediction": 0.0},
    ]


def test_versions(server: Server) -> None:
    """The newest version answers unless another is named."""
    newest = server.predict("doubler", [[2]]).json()
    first = server.post("/v1/models/doubler/versions/1:predict", json={"instances": [[2]]}).json()
    assert newest == {"model": "doubler", "version": 2, "predictions": [{"prediction": 5.0}]}
    assert first == {"model": "doubler", "version": 1, "predictions": [{"prediction": 4.0}]}


def test_binary(server: Server) -> None:
    """A binary model answers prediction, label, the second label's probability, and both probabilities."""
    (answer,) = predictions(server.predict("coin", [{"b": 0, "a": 1}]))
    assert list(answer) == ["prediction", "label", "probability", "probabilities"]
    assert (answer["prediction"], answer["label"]) == (1, "heads")
    assert answer["probability"] == pytest.approx(0.7310586, abs=1e-6)
    assert answer["probabilities"] == pytest.approx([0.2689414, 0.7310586], abs=1e-6)


@pytest.mark.parametrize(("threshold", "label"), [(0, "heads"), (0.5, "heads"), (0.51, "tails"), (1, "tails")])
def test_threshold(threshold: float, label: str, server: Server) -> None:
    """The request's threshold decides, by >=; without one the manifest's does, here 0.7."""
    (answer,) = predictions(server.predict("coin", [[3, 3]], threshold=threshold))
    assert (answer["label"], answer["probability"]) == (label, 0.5)
    assert predictions(server.predict("coin", [[3, 3]]))[0]["label"] == "tails"


def test_multiclass(server: Server) -> None:
    """A multiclass model answers the most probable label and all probabilities; top_k lists the best."""
    (answer,) = predictions(server.predict("compass", [{"x": 2, "y": 1}], top_k=2))
    assert (answer["prediction"], answer["label"]) == (1, "east")
    assert answer["probability"] == max(answer["probabilities"])
    assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-6)
    assert [best["label"] for best in answer["top_k"]] == ["east", "north"]
    assert "top_k" not in predictions(server.predict("compass", [[2, 1]]))[0]


def test_pictures_flat_and_nested(server: Server) -> None:
    """784 numbers in a row and 28 rows of 28 are the same picture."""
    picture = np.random.default_rng(1).random((28, 28), dtype=np.float32)
    flat, nested = predictions(server.predict("canvas", [picture.reshape(-1).tolist(), picture.tolist()]))
    assert flat == nested
    manifest = fakes.canvas().manifest()
    assert flat["label"] == manifest.output.labels[flat["prediction"]]


def test_numbers_of_every_spelling(server: Server) -> None:
    """Whole numbers, exponents, negative zero and long decimals are numbers."""
    body = b'{"instances": [[1], [1.0], [1e0], [100E-2], [0.1e1], [1.00000000000000000000000001], [-0]]}'
    answers = predictions(server.post("/v1/models/doubler:predict", data=body))
    assert [answer["prediction"] for answer in answers] == [2.5] * 6 + [0]


def test_many_instances_equal_their_singles(server: Server) -> None:
    """A thousand instances in one request answer as each alone."""
    rows = np.random.default_rng(2).normal(size=(1000, 2)).round(3).tolist()
    together = predictions(server.predict("coin", rows))
    for index in range(0, 1000, 97):
        (alone,) = predictions(server.predict("coin", [rows[index]]))
        assert alone["probability"] == pytest.approx(together[index]["probability"], rel=1e-5, abs=1e-6)


def test_callers_at_once_get_their_own_answers(server: Server) -> None:
    """Sixteen callers with requests of several sizes each get the answers to what they sent."""

    def ask(number: int) -> bool:
        with requests.Session() as session:
            for step in range(10):
                rows = [[number + step + each] for each in range(1 + (number + step) % 5)]
                answer = session.post(f"{server.url}/v1/models/doubler:predict", json={"instances": rows}, timeout=30)
                if [each["prediction"] for each in predictions(answer)] != [2.5 * row[0] for row in rows]:
                    return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(16)))


class Wire:
    """A plain socket to a server, for requests that no client library would send."""

    def __init__(self, server: Server) -> None:
        parts = urlsplit(server.url)
        self.socket = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10)
        self.reader = self.socket.makefile("rb")

    def answer(self) -> tuple[int, dict[str, str], Any]:
        """Read one answer: status, header fields, decoded body."""
        status = int(self.reader.readline().split()[1])
        fields = {}
        while (line := self.reader.readline().strip()) != b"":
            name, _, value = line.decode().partition(": ")
            fields[name.lower()] = value
        return status, fields, json.loads(self.reader.read(int(fields["content-length"])))

    def close(self) -> None:
        """Close both ends."""
        self.reader.close()
        self.socket.close()


@pytest.fixture
def wire(server: Server) -> Any:
    """A plain socket to the shared server."""
    found = Wire(server)
    yield found
    found.close()


def _post(body: bytes, *fields: str, length: bool = True, version: str = "1.1") -> bytes:
    lines = [f"POST /v1/models/doubler:predict HTTP/{version}", "Host: x", *fields]
    lines += [f"Content-Length: {len(body)}"] if length else []
    return "\r\n".join([*lines, "", ""]).encode() + body


def _numbers(body: Any) -> list[float]:
    return [each["prediction"] for each in body["predictions"]]


def test_connection_is_kept(wire: Wire) -> None:
    """Many requests on one connection, good and bad in turn, are answered in order."""
    for number in range(5):
        wire.socket.sendall(_post(b'{"instances": [[%d]]}' % number))
        assert _numbers(wire.answer()[2]) == [2.5 * number]
        wire.socket.sendall(_post(b"{"))
        assert wire.answer()[0] == 400


def test_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    """Requests sent before the first is answered are answered in order, with the same bodies as one by one."""
    wire.socket.sendall(
        b"".join(_post(b'{"instances": [[%d]]}' % number, f"X-Request-ID: n{number}") for number in range(6))
    )
    for number in range(6):
        status, fields, body = wire.answer()
        assert (status, fields["x-request-id"], _numbers(body)) == (200, f"n{number}", [2.5 * number])


def test_body_in_pieces(wire: Wire) -> None:
    """A body that comes byte by byte is one body."""
    for byte in _post(b'{"instances": [[4]]}'):
        wire.socket.sendall(bytes([byte]))
    assert _numbers(wire.answer()[2]) == [10]


def test_chunked_body(wire: Wire) -> None:
    """A body in chunks, of unknown length beforehand, is one body."""
    pieces = [b'{"insta', b'nces": [', b"[4]]}"]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    wire.socket.sendall(_post(b"", "Transfer-Encoding: chunked", length=False) + chunks)
    assert _numbers(wire.answer()[2]) == [10]


def test_expect_continue(wire: Wire) -> None:
    """A client that waits for 100 Continue gets it, and then its answer."""
    request = _post(b'{"instances": [[4]]}', "Expect: 100-continue")
    head, _, body = request.partition(b"\r\n\r\n")
    wire.socket.sendall(head + b"\r\n\r\n")
    assert wire.reader.readline().startswith(b"HTTP/1.1 100")
    assert wire.reader.readline() == b"\r\n"
    wire.socket.sendall(body)
    assert _numbers(wire.answer()[2]) == [10]


@pytest.mark.parametrize(("version", "fields"), [("1.0", ()), ("1.1", ("Connection: close",))])
def test_connection_is_closed_when_asked(version: str, fields: tuple[str, ...], wire: Wire) -> None:
    """HTTP/1.0 and `Connection: close` end the connection after the answer."""
    wire.socket.sendall(_post(b'{"instances": [[4]]}', *fields, version=version))
    assert _numbers(wire.answer()[2]) == [10]
    assert wire.reader.read() == b""


def test_clients_that_leave_half_way_hurt_nobody(server: Server) -> None:
    """Connections closed in the middle of a head or a body leave the service as it was."""
    request = _post(b'{"instances": [[4]]}')
    for length in (0, 1, 30, len(request) - 5, len(request)):
        wire = Wire(server)
        wire.socket.sendall(request[:length])
        wire.close()
    assert _numbers(server.predict("doubler", [[4]]).json()) == [10]


def test_key_is_read_like_any_other_text(server: Server) -> None:
    """A key sent to a service that wants none changes nothing."""
    secret = base64.b64encode(b"x").decode()
    answer = server.post("/v1/models/doubler:predict", json={"instances": [[4]]}, headers={"X-API-Key": secret})
    assert _numbers(answer.json()) == [10]
