"""Bad input over real HTTP: each is a 4xx with one sentence that says what and where, and the service goes on."""

import json
from collections.abc import Iterator

import pytest
import requests

from tests.servers import Server

COIN, CANVAS, COMPASS = "/v1/models/coin:predict", "/v1/models/canvas:predict", "/v1/models/compass:predict"


@pytest.fixture(autouse=True)
def _goes_on(server: Server) -> Iterator[None]:
    """After each test the service still answers right."""
    yield
    assert server.predict("doubler", [[2]]).json()["predictions"] == [{"prediction": 5.0}]


def assert_refused(answer: requests.Response, status: int, *parts: str) -> None:
    """Check status, the one sentence and its parts, and the request id."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Request-ID"]
    body = answer.json()
    assert list(body) == ["error"]
    assert "\n" not in body["error"]
    assert len(body["error"]) < 400
    for part in parts:
        assert part in body["error"]


def _instances(*rows: str) -> str:
    return '{"instances": [' + ", ".join(rows) + "]}"


PIXELS, ROW = ", ".join(["0.5"] * 783), f"[{', '.join(['0'] * 28)}]"

CASES = {
    "not JSON": (COIN, "a=1&b=2", ["the body is not JSON: "]),
    "empty": (COIN, "", ["the body is empty"]),
    "cut off": (COIN, '{"instances": [[1, 2]', ["the body is not JSON: "]),
    "two values": (COIN, '{"instances": [[1, 2]]} {}', ["the body is not JSON: "]),
    "not UTF-8": (COIN, b'{"instances": [["\xff", 2]]}', ["the body is not JSON: "]),
    "a list": (COIN, "[[1, 2]]", ["the body is a list, expected an object"]),
    "null": (COIN, "null", ["the body is null, expected an object"]),
    "no instances": (COIN, "{}", ['the body has no "instances"']),
    "unknown field": (COIN, '{"rows": [[1, 2]]}', ["unknown field 'rows'"]),
    "empty instances": (COIN, _instances(), ["instances is empty"]),
    "instances null": (COIN, '{"instances": null}', ["instances is null, expected a list"]),
    "instances an object": (COIN, '{"instances": {"a": 1, "b": 2}}', ["instances is an object, expected a list"]),
    "instances a nested object": (COIN, '{"instances": {"ab": [["["]]}}', ["instances is an object, expected a list"]),
    "instances a word": (COIN, '{"instances": "1, 2"}', ["instances is a string, expected a list"]),
    "one instance unwrapped": (COIN, _instances("1", "2"), ["instances[0] is a number, expected a list of numbers"]),
    "too short": (COIN, _instances("[1, 2]", "[1]"), ["instances[1] has 1 values, expected 2"]),
    "too long": (COIN, _instances("[1, 2, 3]"), ["instances[0] has 3 values, expected 2"]),
    "783 pixels": (CANVAS, _instances(*[f"[{PIXELS}, 0]"] * 3, f"[{PIXELS}]"), ["instances[3] has 783 values"]),
    "nested too deep": (COIN, _instances("[[1, 2]]"), ["instances[0] has 1 values, expected 2"]),
    "nested wrongly": (COIN, _instances("[1, [2]]"), ["instances[0][1] is a list, expected a number"]),
    "27 rows": (CANVAS, _instances(f"[{', '.join([ROW] * 27)}]"), ["instances[0] has 27 rows, expected 28"]),
    "a string": (COIN, _instances('[1, "2"]'), ["instances[0][1] is a string, expected a number"]),
    "a null": (COIN, _instances("[null, 2]"), ["instances[0][0] is null, expected a number"]),
    "a boolean": (COIN, _instances("[1, 2]", "[1, true]"), ["instances[1][1] is a boolean, expected a number"]),
    "NaN": (COIN, _instances("[NaN, 2]"), ["the body is not JSON: ", "column 17"]),
    "Infinity": (COIN, _instances("[1, -Infinity]"), ["the body is not JSON: ", "column"]),
    "1e999": (COIN, _instances("[1, 1e999]"), ["the body is not JSON: ", "column 20"]),
    "1e39": (COIN, _instances("[1, 2]", "[1, 1e39]"), ["instances[1][1] is not a finite number that float32 can hold"]),
    "a pixel of 255": (CANVAS, _instances(f"[{PIXELS}, 255]"), ["instances[0][783] is 255, outside [0, 1]", "divide"]),
    "unknown feature": (COIN, _instances('{"a": 1, "b": 2, "c": 3}'), ["instances[0] has an unknown feature 'c'"]),
    "missing feature": (COIN, _instances("[1, 2]", '{"a": 1}'), ["instances[1] lacks the feature 'b'", "a, b"]),
    "feature of a string": (COIN, _instances('{"a": 1, "b": "x"}'), ["instances[0].b is a string, expected a number"]),
    "unknown parameter": (COIN, '{"instances": [[1, 2]], "parameters": {"top_k": 1}}', ["unknown parameter 'top_k'"]),
    "parameters a list": (COIN, '{"instances": [[1, 2]], "parameters": []}', ["parameters is a list, expected an"]),
    "threshold 1.5": (COIN, '{"instances": [[1, 2]], "parameters": {"threshold": 1.5}}', ["threshold is 1.5, outside"]),
    "threshold -1": (COIN, '{"instances": [[1, 2]], "parameters": {"threshold": -1}}', ["threshold is -1, outside"]),
    "threshold a word": (COIN, '{"instances": [[1, 2]], "parameters": {"threshold": "hi"}}', ["threshold is a string"]),
    "top_k 0": (COMPASS, '{"instances": [[1, 2]], "parameters": {"top_k": 0}}', ["top_k is 0, outside [1, 4]"]),
    "10 MB of brackets": (COIN, "[" * 10**7, ["the body is not JSON: "]),
    "10 MB of brackets inside": (COIN, '{"instances": ' + "[" * 10**7, ["the body is not JSON: "]),
    "10 MB of objects": (COIN, '{"a":' * (2 * 10**6), ["the body is not JSON: "]),
    "a long word": (COIN, json.dumps({"x" * 10**6: 1}), ["unknown field 'xxx"]),
    "a long name": (COIN, json.dumps({"instances": [{"x" * 10**6: 1}]}), ["unknown feature 'xxx"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_unusable_body_is_a_400(case: str, server: Server) -> None:
    """Every malformed body or value is a 400 whose sentence says what is wrong and where."""
    path, body, parts = CASES[case]
    assert_refused(server.post(path, data=body, headers={"Content-Type": "application/json"}), 400, *parts)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/v1/models/nosuch:predict", "'nosuch' is not found; it is not one of canvas, coin, compass, doubler, switch"),
        ("/v1/models/coin/versions/9:predict", "'coin' has no version '9'; it has 1"),
        ("/v1/models/coin/versions/one:predict", "'coin' has no version 'one'; it has 1"),
        ("/v1/models/..%5C..%5Cetc:predict", "is not found; it is not one of canvas"),
        ("/v2/nosuch", "there is nothing at /v2/nosuch; see /docs"),
        ("/nosuch", "there is nothing at /nosuch; see /docs"),
        ("/v1/models/", "there is nothing at /v1/models/; see /docs"),
    ],
)
def test_unknown_model_version_and_path_are_404(path: str, part: str, server: Server) -> None:
    """What is not there is a 404 that names it and what there is."""
    assert_refused(server.post(path, json={"instances": [[1, 2]]}), 404, part)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_predict_answers_post_alone(method: str, server: Server) -> None:
    """Another method on a predict path is a 405 whose Allow says POST."""
    answer = requests.request(method, server.url + COIN, timeout=10)
    assert_refused(answer, 405, method, "POST")
    assert answer.headers["Allow"] == "POST"


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/coin", "/health/live", "/health/ready", "/openapi.json", "/docs"]
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_reading_answers_get_alone(method: str, path: str, server: Server) -> None:
    """Another method on a path to read is a 405 whose Allow says GET."""
    answer = requests.request(method, server.url + path, json={}, timeout=10)
    assert_refused(answer, 405, method, path)
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize(
    ("headers", "part"),
    [
        ({"Content-Type": "text/csv"}, "content type text/csv is not read here"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, "content type multipart/form-data is not read here"),
        ({"Content-Type": "application/json", "Content-Encoding": "br"}, "content encoding br is not read here"),
    ],
)
def test_other_media_are_415(headers: dict[str, str], part: str, server: Server) -> None:
    """A body that is not plain JSON is a 415 that says what to send."""
    assert_refused(server.post(COIN, data=b'{"instances": [[1, 2]]}', headers=headers), 415, part)


@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "in chunks"])
def test_body_over_the_limit_is_413(chunked: bool, server: Server) -> None:
    """A body over the limit is a 413 that names the limit, and the client hears it."""
    body = b" " * (17 * 2**20)
    sent = (body[start : start + 2**16] for start in range(0, len(body), 2**16)) if chunked else body
    answer = server.post(COIN, data=sent, headers={"Content-Type": "application/json"})
    assert_refused(answer, 413, f"the body is over the limit of {16 * 2**20} bytes")


def test_bad_requests_do_not_disturb_good_ones(server: Server) -> None:
    """One caller's malformed requests, in between, fail none of another's."""
    with requests.Session() as good, requests.Session() as bad:
        for number in range(50):
            refused = bad.post(server.url + COIN, json={"instances": [[1]]}, timeout=10)
            answer = good.post(server.url + COIN, json={"instances": [[number, 0]]}, timeout=10)
            assert (refused.status_code, answer.status_code) == (400, 200)
