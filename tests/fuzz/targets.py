"""What is fuzzed by coverage: functions that take any bytes, and raise where the code under test breaks a promise.

Each promise is stronger than "does not crash": a decoder gives finite float32 inputs of the model's shape or a refusal
of the caller's, and a connection answers the same however its bytes are cut.
"""

import gzip
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from service.api.content_coding import inflate
from service.api.headers import build_response_fields, match_target, read_headers
from service.api.v1 import decode as v1_decode
from service.api.v2 import decode as v2_decode
from service.errors import InvalidRequestError, RequestError
from service.model import preprocess  # noqa: F401 - elsewhere imported when first needed, too late to be instrumented
from service.model.manifest import Manifest
from tests import fakes
from tests.fuzz.connection import check_connection

LIMIT = 2**20  # bytes of a body
_BOUNDARY = b"multipart/form-data; boundary=x"
_TABULAR = [fakes.coin().only("onnx").manifest(), fakes.doubler().only("onnx").manifest()]
_IMAGES = [fakes.canvas().only("onnx").manifest(), fakes.traffic_light().manifest()]


def check_v1(data: bytes) -> None:
    """Decode JSON for tabular and image models."""
    for manifest in (*_TABULAR, _IMAGES[0]):
        _check_call(v1_decode.decode, data, manifest, [])


def check_v2(data: bytes) -> None:
    """Decode the protocol's JSON."""
    for manifest in _TABULAR:
        _check_call(v2_decode.decode, data, manifest, [])


def check_v2_binary(data: bytes) -> None:
    """Decode the protocol's JSON with tensors behind it; the first byte says how long the JSON is."""
    head = data[:1]
    length = (head[0] if head else 0) + 1
    fields = [(b"inference-header-content-length", b"%d" % length)]
    _check_call(v2_decode.decode, data[1:], _TABULAR[0], fields)


def check_pictures(data: bytes) -> None:
    """Decode a picture, and a form of pictures."""
    for manifest in _IMAGES:
        for kind in (b"image/png", _BOUNDARY):
            _check_call(v1_decode.decode, data, manifest, [(b"content-type", kind)])


def check_coding(data: bytes) -> None:
    """Inflate; what the standard library inflates in one go must come out the same."""
    try:
        content = inflate(data, LIMIT, lambda: None)
    except RequestError:
        content = None
    for decompress in (gzip.decompress, zlib.decompress):
        with suppress(OSError, EOFError, zlib.error):
            expected = decompress(data)
            assert content is None or content == expected, "inflated to something else"
    assert content is None or len(content) <= LIMIT


def check_head(data: bytes) -> None:
    """Read a target and header fields, as they come from the parser."""
    target, *lines = data.split(b"\n")
    with suppress(InvalidRequestError):
        match_target(target)
        head = read_headers([(name.lower(), value) for name, _, value in (line.partition(b":") for line in lines)])
        assert b"\r" not in head.request_id
        assert 0 < head.choose_timeout(30) <= 30
        assert build_response_fields(head.request_id, head.trace).count(b"\r\n") <= 2


def _check_call(decode: Callable[..., Any], data: bytes, manifest: Manifest, fields: list[tuple[bytes, bytes]]) -> None:
    try:
        call = decode(data, manifest, read_headers(fields))
    except RequestError as error:
        sentence = str(error)
    else:
        assert call.inputs.dtype == np.float32
        assert call.inputs.shape[1:] == tuple(manifest.input.shape)
        assert np.isfinite(call.inputs).all()
        return
    assert sentence.isprintable(), "a sentence with control characters"


TARGETS: dict[str, Callable[[bytes], None]] = {
    "http": check_connection,
    "v1": check_v1,
    "v2": check_v2,
    "v2-binary": check_v2_binary,
    "pictures": check_pictures,
    "coding": check_coding,
    "head": check_head,
}
