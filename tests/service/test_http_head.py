"""Tests of service.http.head: a head that was read before means what it meant then, and nothing more."""

import json
import re

import pytest

from service.http.head import known_heads
from tests.conformance.cases import CASES
from tests.fuzz.connection import converse
from tests.wire import build_predict, build_request

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
MODEL = "doubler"
KNOWN = build_predict(MODEL, [1.0])
HEAD, BODY = KNOWN.split(b"\r\n\r\n")


@pytest.fixture(autouse=True)
def _forget() -> None:
    known_heads.clear()


def answer(*pieces: bytes) -> tuple[list[bytes], str]:
    """Return the statuses of the answers to what is sent on one connection, and what becomes of it."""
    written, end = converse(list(pieces), False)
    return _STATUS.findall(written), end


def test_head_of_a_whole_request_is_known_to_the_next() -> None:
    """The body is another each time, and of the announced length."""
    other = json.dumps({"instances": [[7.0]]}).encode()
    written, end = converse([KNOWN, HEAD + b"\r\n\r\n" + other], False)
    assert list(known_heads) == [HEAD + b"\r\n\r\n"]
    assert (_STATUS.findall(written), end) == ([b"200", b"200"], "usable")
    assert re.findall(rb'"prediction":([\d.]+)', written) == [b"2.0", b"14.0"]


@pytest.mark.parametrize(
    ("rest", "statuses", "end"),
    [
        ([BODY[:5], BODY[5:]], [b"200", b"200"], "usable"),
        ([BODY + KNOWN], [b"200", b"200", b"200"], "usable"),
        ([BODY + b"GARBAGE\r\n\r\n"], [b"200", b"200", b"400"], "closed"),
        ([BODY[:-1]], [b"200"], "waiting"),
        ([b"{" * len(BODY)], [b"200", b"400"], "usable"),
    ],
    ids=["in two parts", "with another behind it", "with garbage behind it", "cut off", "not JSON"],
)
def test_request_with_a_known_head_is_answered_as_before(rest: list[bytes], statuses: list[bytes], end: str) -> None:
    """What is no whole request, or more than one, goes to the parser."""
    assert answer(KNOWN, HEAD + b"\r\n\r\n" + rest[0], *rest[1:]) == (statuses, end)


@pytest.mark.parametrize(
    "request_bytes",
    [
        build_predict(MODEL, [1.0], fields=("X-Request-ID: a",)),
        build_predict(MODEL, [1.0], fields=("Connection: close",)),
        build_predict(MODEL, [1.0], fields=("Expect: 100-continue",)),
        build_predict(MODEL, [1.0], fields=("Host: twice",)),
        build_predict(MODEL, [1.0], fields=(f"X-Long: {'x' * 2000}",)),
        build_request(f"/v1/models/{MODEL}:predict", None, "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n",
        KNOWN.replace(b"HTTP/1.1", b"HTTP/1.0"),
        KNOWN.replace(b"POST", b"PUT"),
        KNOWN[:-1],
        KNOWN + b"\r\n",
    ],
    ids=["an id", "the last", "expects", "refused", "long", "chunked", "old", "a PUT", "cut off", "with a blank line"],
)
def test_head_that_says_more_than_the_plainest_is_not_kept(request_bytes: bytes) -> None:
    """Nor is one whose end is not sure."""
    converse([request_bytes], False)
    assert not known_heads


def test_every_case_is_answered_alike_when_it_comes_again() -> None:
    """A case that is answered otherwise behind the heads of all others would have been taken for one of them."""
    sent = {case.name: case.sent.encode("latin-1") for case in CASES if isinstance(case.sent, str)}
    first = {name: answer(data) for name, data in sent.items() if len(data) < 20_000}
    assert known_heads
    assert {name: answer(sent[name]) for name in first} == first


def test_known_heads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers choose their heads, so not all can be kept."""
    monkeypatch.setattr("service.http.head._MOST_KNOWN", 3)
    for number in range(8):
        converse([build_predict(MODEL, [1.0], fields=(f"X-Number: {number}",))], False)
        assert 1 <= len(known_heads) <= 3
