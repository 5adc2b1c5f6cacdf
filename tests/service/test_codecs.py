"""Tests of service.api.codecs: content encodings around both wire formats."""

import gzip
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api import codecs
from service.api.headers import RequestHeaders
from service.errors import InvalidRequestError, TooLargeError
from tests import fakes

MANIFEST = fakes.doubler().manifest()
BODY = b'{"instances": [[2]]}'


def deflate_raw(content: bytes) -> bytes:
    """Return a raw deflate stream, which some clients send as "deflate"."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, deflate_raw])
def test_compressed_bodies_are_read(compress: object) -> None:
    """gzip, zlib and raw deflate all give back the body."""
    assert callable(compress)
    for content in (b"", BODY, bytes(1000)):
        assert codecs.inflate(compress(content), 1000) == content
    call = codecs.decode("v1", compress(BODY), MANIFEST, RequestHeaders(b"", content_encoding=b"gzip"), 100)
    assert call.inputs.tolist() == [[2]]


def test_size_counts_once_decompressed() -> None:
    """A body over the limit once decompressed is refused as too large, before all of it is in memory."""
    bomb = gzip.compress(bytes(10**8))
    with pytest.raises(TooLargeError, match="over the limit of 1000 bytes once decompressed"):
        codecs.inflate(bomb, 1000)


@pytest.mark.parametrize("damage", ["cut", "more", "other", "empty"])
def test_damaged_bodies_are_refused(damage: str) -> None:
    """Cut short, followed by more, or not compressed at all: the caller's fault, with a sentence."""
    whole = gzip.compress(BODY)
    body = {"cut": whole[:-5], "more": whole + b"x", "other": BODY, "empty": b""}[damage]
    with pytest.raises(InvalidRequestError, match="compressed body"):
        codecs.inflate(body, 1000)


@given(st.binary(max_size=100))
def test_any_bytes_are_inflated_or_refused(body: bytes) -> None:
    """Whatever the bytes, nothing but a refusal is ever raised."""
    try:
        codecs.inflate(body, 1000)
    except (InvalidRequestError, TooLargeError):
        return


def encode(accepted: str, rows: int) -> tuple[dict[str, str], bytes]:
    """Return the header fields and body of an answer with `rows` rows."""
    head = RequestHeaders(b"", accept_encoding=accepted.encode())
    call = codecs.decode("v1", BODY, MANIFEST, head, 100)
    lines, body = codecs.encode("v1", np.ones((rows, 1), np.float32), MANIFEST, call, head)
    fields = dict(line.split(": ") for line in lines.decode().splitlines())
    return fields, body


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip", "gzip"),
        ("GZIP", "gzip"),
        ("deflate", "deflate"),
        ("deflate, gzip;q=0.5", "gzip"),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip; q=0.00", None),
        ("br", None),
        ("", None),
    ],
)
def test_long_answers_are_compressed_for_who_asks(accepted: str, encoding: str | None) -> None:
    """A long answer has an encoding that Accept-Encoding takes, and says on what it depends."""
    fields, body = encode(accepted, 2000)
    assert fields.get("content-encoding") == encoding
    assert fields["vary"] == "accept-encoding"
    plain = encode("", 2000)[1]
    assert (codecs.inflate(body, 10**6) if encoding else body) == plain


def test_short_answers_are_not_compressed() -> None:
    """A short answer travels as it is."""
    assert "content-encoding" not in encode("gzip", 1)[0]
