"""Tests of service.api.content_coding."""

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.content_coding import compress, inflate
from service.errors import InvalidRequestError, TooLargeError

BODY = b'{"instances": [[2]]}'


def deflate_raw(content: bytes) -> bytes:
    """Return a raw deflate stream, which some clients send as "deflate"."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, deflate_raw])
def test_compressed_bodies_are_read(pack: object) -> None:
    """gzip, zlib and raw deflate all give back the body."""
    assert callable(pack)
    for content in (b"", BODY, bytes(1000)):
        assert inflate(pack(content), 1000, bool) == content


def test_size_counts_once_decompressed() -> None:
    """A body over the limit once decompressed is refused as too large, before all of it is in memory."""
    bomb = gzip.compress(bytes(10**8))
    with pytest.raises(TooLargeError, match="over the limit of 1000 bytes once decompressed"):
        inflate(bomb, 1000, bool)


@pytest.mark.parametrize("damage", ["cut", "more", "other", "empty"])
def test_damaged_bodies_are_refused(damage: str) -> None:
    """Cut short, followed by more, or not compressed at all: the caller's fault, with a sentence."""
    whole = gzip.compress(BODY)
    body = {"cut": whole[:-5], "more": whole + b"x", "other": BODY, "empty": b""}[damage]
    with pytest.raises(InvalidRequestError, match="compressed body"):
        inflate(body, 1000, bool)


@given(st.binary(max_size=100))
def test_any_bytes_are_inflated_or_refused(body: bytes) -> None:
    """Whatever the bytes, nothing but a refusal is ever raised."""
    try:
        inflate(body, 1000, bool)
    except (InvalidRequestError, TooLargeError):
        return


LONG = BODY * 2000


def encode(accepted: str) -> tuple[dict[str, str], bytes]:
    """Return the header fields and body of a long response."""
    lines, body = compress(b"", LONG, accepted.encode())
    return dict(line.split(": ") for line in lines.decode().splitlines()), body


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
    fields, body = encode(accepted)
    assert fields.get("content-encoding") == encoding
    assert fields["vary"] == "accept-encoding"
    assert (inflate(body, 10**6, bool) if encoding else body) == LONG
