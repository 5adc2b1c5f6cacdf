"""What servers of the Open Inference Protocol get wrong, over real HTTP: each is a 4xx with {"error": sentence}."""

import gzip
import json
import socket
import zlib
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import numpy as np
import orjson
import pytest
import requests

from tests.servers import Server
from tests.service.test_v2_infer import MALFORMED, build_body, build_input

INFER = "/v2/models/compass/infer"
LENGTH = "Inference-Header-Content-Length"
GOOD = orjson.dumps(build_body(outputs=[{"name": "outputs"}]))


@pytest.fixture(autouse=True)
def _goes_on(server: Server) -> Iterator[None]:
    """After each test the service still answers right."""
    yield
    assert server.post(INFER, data=GOOD).json()["outputs"][0]["data"] == [2, 1, -2, -1, 4, 3, -4, -3]


def assert_refused(answer: requests.Response, status: int) -> str:
    """Check status and body of a refusal and return its sentence."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    body: dict[str, str] = answer.json()
    assert list(body) == ["error"]
    assert "\n" not in body["error"]
    return body["error"]


@pytest.mark.parametrize("compress", [None, gzip.compress, zlib.compress])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_request_is_a_400(case: str, compress: Any, server: Server) -> None:
    """Every malformed request is a 400, never a 500, plain or compressed."""
    header, binary = MALFORMED[case]
    header = header if isinstance(header, bytes) else orjson.dumps(header)
    headers = {LENGTH: str(len(header)), "Content-Type": "application/octet-stream"} if binary else {}
    body = header + binary
    if compress is not None:
        headers["Content-Encoding"] = "gzip" if compress is gzip.compress else "deflate"
        body = compress(body)
    assert_refused(server.post(INFER, data=body, headers=headers), 400)


@pytest.mark.parametrize("length", ["-1", "+5", "1.5", "0x10", "five", "1 2", "9" * 40, str(len(GOOD) + 1)])
def test_json_length_that_is_none_is_a_400(length: str, server: Server) -> None:
    """A JSON length that is no number, negative, or larger than the body."""
    assert LENGTH in assert_refused(server.post(INFER, data=GOOD, headers={LENGTH: length}), 400)


def test_binary_data_without_the_header_is_a_400(server: Server) -> None:
    """Raw bytes without the header that says where they start are not JSON."""
    body = np.ones((1, 2), "<f4").tobytes()
    assert_refused(server.post(INFER, data=body, headers={"Content-Type": "application/octet-stream"}), 400)


def test_raw_binary(server: Server) -> None:
    """With the header 0 the whole body is one row; every output comes back binary, its JSON length in the header."""
    answer = server.post(INFER, data=np.array([[3, 4]], "<f4").tobytes(), headers={LENGTH: "0"})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/octet-stream"
    about = json.loads(answer.content[: int(answer.headers[LENGTH])])
    assert [output["name"] for output in about["outputs"]] == ["outputs", "prediction", "probabilities", "label"]
    assert all("data" not in output for output in about["outputs"])
    sizes = [output["parameters"]["binary_data_size"] for output in about["outputs"]]
    assert sum(sizes) == len(answer.content) - int(answer.headers[LENGTH])
    start = int(answer.headers[LENGTH])
    assert np.frombuffer(answer.content[start : start + 16], "<f4").tolist() == [4, 3, -4, -3]
    assert_refused(server.post(INFER, data=b"\0" * 7, headers={LENGTH: "0"}), 400)


def test_no_header_when_nothing_is_binary(server: Server) -> None:
    """An answer in JSON alone is plain JSON, without the extension's header."""
    answer = server.post(INFER, data=GOOD)
    assert answer.headers["Content-Type"] == "application/json"
    assert LENGTH not in answer.headers


def test_body_in_chunks(server: Server) -> None:
    """A chunked upload without Content-Length is read as any other."""
    answer = server.post(INFER, data=iter([GOOD[:10], GOOD[10:]]))
    assert answer.status_code == 200
    assert answer.request.headers["Transfer-Encoding"] == "chunked"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (gzip.compress(bytes(2**25), mtime=0), {"Content-Encoding": "gzip"}, 413),
        (gzip.compress(GOOD, mtime=0)[:-4], {"Content-Encoding": "gzip"}, 400),
        (GOOD, {"Content-Encoding": "gzip"}, 400),
        (GOOD, {"Content-Encoding": "br"}, 415),
        (GOOD, {"Content-Type": "text/xml"}, 415),
        (GOOD, {"Content-Type": "image/png"}, 415),
    ],
)
def test_encodings_that_are_wrong(body: bytes, headers: dict[str, str], status: int, server: Server) -> None:
    """Too large once decompressed, damaged, not what it says, or in a form that is not read."""
    assert_refused(server.post(INFER, data=body, headers=headers), status)


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2fetc", "a/b", "%00", "compass%20", "compass/1", "x" * 3000])
def test_names_lead_nowhere(name: str, server: Server) -> None:
    """A name that is no model's is a 404 on every path that takes one; none reaches the file system."""
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    for method, path in (
        ("POST", f"/v2/models/{name}/infer"),
        ("POST", f"/v2/models/compass/versions/{name}/infer"),
        ("GET", f"/v2/models/{name}"),
        ("GET", f"/v2/models/{name}/config"),
        ("POST", f"/v2/repository/models/{name}/load"),
        ("POST", f"/v2/repository/models/{name}/unload"),
    ):
        connection.request(method, path, b"{}" if method == "POST" else None, server.token_headers())
        answer = connection.getresponse()
        assert (answer.status, list(json.loads(answer.read()))) == (404, ["error"]), (method, path)
    connection.close()


READING = [
    "/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/v2/models", "/v2/models/stats", "/v2/models/compass",
    "/v2/models/compass/ready", "/v2/models/compass/config", "/v2/models/compass/stats",
    "/v2/models/compass/versions/1", "/v2/models/compass/versions/1/ready", "/v2/models/compass/versions/1/config",
    "/v2/models/compass/versions/1/stats",
]  # fmt: skip
WRITING = [INFER, "/v2/models/compass/versions/1/infer", "/v2/repository/index", "/v2/repository/models/compass/load"]


@pytest.mark.parametrize("path", READING)
def test_reading_answers_get_and_head(path: str, server: Server) -> None:
    """GET gives JSON, HEAD the same without a body; any other method is a 405 that says which."""
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    for method in ("GET", "HEAD"):
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read()
        assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
        assert bool(body) == (method == "GET")
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        connection.request(method, path)
        answer = connection.getresponse()
        assert (answer.status, list(json.loads(answer.read()))) == (405, ["error"])
        assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD"}
    connection.close()


@pytest.mark.parametrize("path", WRITING)
def test_writing_answers_post_alone(path: str, server: Server) -> None:
    """Another method is a 405 that says POST; that of a HEAD has no body, so that the connection stays usable."""
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read()
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")
        assert body == b"" if method == "HEAD" else list(json.loads(body)) == ["error"]
    connection.request("GET", "/v2/health/live")
    assert json.loads(connection.getresponse().read()) == {"live": True}
    connection.close()


def test_raw_head_has_no_body(server: Server) -> None:
    """What follows the head of a HEAD's answer on the wire is the next answer, not a body."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        wire.sendall(f"HEAD {INFER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        received = b"".join(iter(lambda: wire.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 405 ")
    assert received.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "path", ["/v2/nosuch", "/v2/models/compass/nosuch", "/v2/repository/nosuch", "/v2/models/a/b/c"]
)
def test_unknown_path_is_a_404(path: str, server: Server) -> None:
    """There is a sentence for that, too."""
    assert_refused(server.get(path), 404)


def test_timeout_parameter_is_a_deadline(server: Server) -> None:
    """`timeout` in microseconds shortens the request's deadline; one that has passed is a 504."""
    rows = np.zeros((4000, 2), "<f4")
    about = build_input(shape=[4000, 2], data=..., parameters={"binary_data_size": rows.nbytes})
    header = orjson.dumps(build_body(inputs=[about], parameters={"timeout": 1}))
    answer = server.post(INFER, data=header + rows.tobytes(), headers={LENGTH: str(len(header))})
    assert answer.status_code in (200, 504)
    if answer.status_code == 504:
        assert "deadline" in assert_refused(answer, 504)
