"""Tests of service.api.content_coding."""

import gzip
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.content_coding import compress, inflate, read_coding
from service.errors import ClientClosedError, InvalidRequestError, TooLargeError

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


def test_members_are_read_as_one() -> None:
    """Gzip in several members is one body, in any number up to a limit; other bytes between them are refused."""
    parts = [BODY[at : at + 3] for at in range(0, len(BODY), 3)]
    whole = b"".join(map(gzip.compress, parts))
    assert inflate(whole, 1000, bool) == BODY
    with pytest.raises(InvalidRequestError, match="bytes after its end"):
        inflate(whole + b"\0", 1000, bool)
    with pytest.raises(InvalidRequestError, match="cut short"):
        inflate(whole[:-9], 1000, bool)
    with pytest.raises(InvalidRequestError, match="over 1024 members"):
        inflate(gzip.compress(b"") * 1025, 1000, bool)


@pytest.mark.parametrize("level", [1, 9])
def test_ratio_is_limited_for_what_is_large(level: int) -> None:
    """Up to 4 MB may come of any body; more only of one that is not a two-hundredth of it."""
    zeros = b"0," * 2**21
    assert inflate(gzip.compress(zeros, level), 2**30, bool) == zeros
    with pytest.raises(TooLargeError, match="over 200 times its size; send it uncompressed"):
        inflate(gzip.compress(zeros * 4, level), 2**30, bool)
    noise = zlib.compress(np.random.default_rng(0).bytes(2**17) + zeros * 4, level)
    assert len(inflate(noise, 2**30, bool)) == 2**17 + 4 * len(zeros)


def test_inflating_ends_when_nobody_waits() -> None:
    """Every megabyte it is asked whether anybody still waits."""
    checks = iter([None, None, ClientClosedError("gone")])

    def check() -> None:
        if error := next(checks):
            raise error

    with pytest.raises(ClientClosedError):
        inflate(gzip.compress(bytes(2**22)), 2**30, check)


@pytest.mark.parametrize(
    ("values", "coding"),
    [
        ([b"gzip"], b"gzip"),
        ([b"GZip"], b"gzip"),
        ([b"x-gzip"], b"gzip"),
        ([b"Deflate"], b"deflate"),
        ([b"identity"], b""),
        ([b""], b""),
        ([b"identity, gzip ,"], b"gzip"),
        ([b"gzip", b"identity"], b"gzip"),
        ([b"gzip", b"br"], b"gzip, br"),
        ([b"gzip, x-gzip"], b"gzip, gzip"),
    ],
)
def test_coding_is_read_as_a_list(values: list[bytes], coding: bytes) -> None:
    """Names are case-insensitive, several fields are one list, and `identity` is none."""
    assert read_coding(values) == coding
