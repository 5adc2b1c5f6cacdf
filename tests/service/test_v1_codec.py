"""Tests of service.api.v1.decode and encode."""

import json
from typing import Any

import numpy as np
import pytest

from service.api.headers import RequestHeaders
from service.api.v1 import decode as v1_decode
from service.api.v1.encode import encode
from service.errors import InvalidRequestError
from service.model.manifest import Manifest
from tests import fakes

COIN, COMPASS, DOUBLER = fakes.coin().manifest(), fakes.compass().manifest(), fakes.doubler().manifest()


PLAIN = RequestHeaders(b"")


def decode(body: Any, manifest: Manifest = COIN) -> v1_decode.Call:
    """Decode a body given as JSON's value."""
    return v1_decode.decode(json.dumps(body).encode(), manifest, PLAIN)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", 'the body is empty; send {"instances": [...]}'),
        (b"  \n", 'the body is empty; send {"instances": [...]}'),
        (b"not json", "the body is not JSON: "),
        (b"{", "the body is not JSON: "),
        (b"\xff\xfe", "the body is not JSON: "),
        (b'{"instances": [[NaN, 1]]}', "the body is not JSON: "),
        (b'{"instances": [[Infinity, 1]]}', "the body is not JSON: "),
        (b'{"instances": [[1e999, 1]]}', "the body is not JSON: "),
        (b"[" * 10**6, "the body is not JSON: "),
        (b"[]", "the body is a list, expected an object"),
        (b"null", "the body is null, expected an object"),
        (b"3", "the body is a number, expected an object"),
        (b"{}", 'the body has no "instances"'),
        (b'{"parameters": {}}', 'the body has no "instances"'),
        (b'{"instances": [[1, 2]], "instance": 1}', "unknown field 'instance'; a predict body has instances and"),
    ],
)
def test_unusable_body_is_refused(body: bytes, message: str) -> None:
    """A body that is not an object with instances is refused with a sentence that says what it is."""
    with pytest.raises(InvalidRequestError) as caught:
        v1_decode.decode(body, COIN, PLAIN)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("parameters", "manifest", "message"),
    [
        (None, COIN, "parameters is null, expected an object"),
        ([], COIN, "parameters is a list, expected an object"),
        ({"temperature": 1}, COIN, "unknown parameter 'temperature' for a binary model; it takes threshold"),
        ({"top_k": 1}, COIN, "unknown parameter 'top_k' for a binary model; it takes threshold"),
        ({"threshold": 0.5}, COMPASS, "unknown parameter 'threshold' for a multiclass model; it takes top_k"),
        ({"threshold": 0.5}, DOUBLER, "unknown parameter 'threshold' for a regression model; it takes none"),
        ({"threshold": 1.01}, COIN, "parameters.threshold is 1.01, outside [0, 1]"),
        ({"threshold": -1}, COIN, "parameters.threshold is -1, outside [0, 1]"),
        ({"threshold": "0.5"}, COIN, "parameters.threshold is a string, expected a number in [0, 1]"),
        ({"threshold": None}, COIN, "parameters.threshold is null, expected a number in [0, 1]"),
        ({"threshold": True}, COIN, "parameters.threshold is a boolean, expected a number in [0, 1]"),
        ({"top_k": 0}, COMPASS, "parameters.top_k is 0, outside [1, 4]"),
        ({"top_k": 5}, COMPASS, "parameters.top_k is 5, outside [1, 4]"),
        ({"top_k": 1.5}, COMPASS, "parameters.top_k is 1.5, expected a whole number"),
        ({"top_k": True}, COMPASS, "parameters.top_k is a boolean, expected a whole number"),
        ({"top_k": "x" * 10_000}, COMPASS, "parameters.top_k is a string, expected a whole number"),
        ({"top_k": None}, COMPASS, "parameters.top_k is null, expected a whole number"),
    ],
)
def test_unusable_parameter_is_refused(parameters: Any, manifest: Manifest, message: str) -> None:
    """A parameter of another task, type or range is refused, and nothing the caller sent is echoed at length."""
    with pytest.raises(InvalidRequestError) as caught:
        decode({"instances": [[1] * manifest.input.shape[0]], "parameters": parameters}, manifest)
    assert str(caught.value) == message


def test_parameters_are_read() -> None:
    """Threshold and top_k reach the call; 0 and 1 are thresholds."""
    assert decode({"instances": [[1, 2]], "parameters": {"threshold": 0}}).threshold == 0
    assert decode({"instances": [[1, 2]], "parameters": {"threshold": 1}}).threshold == 1
    assert decode({"instances": [[1, 2]], "parameters": {"top_k": 4}}, COMPASS).top_k == 4
    assert decode({"instances": [[1, 2]], "parameters": {}}).threshold is None
    assert decode({"instances": [[1, 2]]}).threshold is None


def test_byte_order_mark_is_ignored() -> None:
    """A UTF-8 byte order mark is ignored, as RFC 8259 allows, by both readers."""
    for parameters in (b"", b', "parameters": {}'):
        call = v1_decode.decode(b'\xef\xbb\xbf{"instances": [[1, 2]]' + parameters + b"}", COIN, PLAIN)
        assert call.inputs.tolist() == [[1, 2]]


def test_regression_answer() -> None:
    """A regression answers numbers, the shortest that read back as the same float32."""
    call = decode({"instances": [[1], [2]]}, DOUBLER)
    body = encode(np.array([[0.1], [-2]], np.float32), DOUBLER, call)[1]
    assert body == b'{"model":"doubler","version":1,"predictions":[{"prediction":0.1},{"prediction":-2.0}]}'


def test_binary_answer_reports_the_second_label_and_decides_by_threshold() -> None:
    """`probability` is that of the second label, whichever is predicted; the request's threshold decides."""
    outputs = np.array([[0.25]], np.float32)
    for threshold, index, label in ((0.25, 1, "heads"), (0.3, 0, "tails")):
        call = decode({"instances": [[1, 2]], "parameters": {"threshold": threshold}})
        answer = json.loads(encode(outputs, COIN, call)[1])["predictions"]
        expected = {"prediction": index, "label": label, "probability": 0.25, "probabilities": [0.75, 0.25]}
        assert answer == [expected]


def test_multiclass_answer_and_its_best() -> None:
    """`probability` is that of the predicted label; top_k lists the most probable, equal ones in label order."""
    outputs = np.log(np.array([[0.25, 0.125, 0.5, 0.125]], np.float32))
    call = decode({"instances": [[1, 2]], "parameters": {"top_k": 3}}, COMPASS)
    (answer,) = json.loads(encode(outputs, COMPASS, call)[1])["predictions"]
    best = answer.pop("top_k")
    assert answer == {"prediction": 2, "label": "south", "probability": 0.5, "probabilities": [0.25, 0.125, 0.5, 0.125]}
    assert [(each["label"], each["probability"]) for each in best] == [("south", 0.5), ("north", 0.25), ("east", 0.125)]
    assert best[2]["prediction"] == 1
