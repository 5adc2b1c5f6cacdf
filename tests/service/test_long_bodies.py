"""Tests of reading long bodies in pieces: by service.api.v1.decode, service.api.v2.datatypes and json_values."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.api import json_values
from service.api.headers import RequestHeaders
from service.api.json_values import parse_long_numbers, parse_numbers, read_object, split_list, write_numbers
from service.api.limits import MAX_VALUES, ReadLimits, check_values
from service.api.v1 import decode as v1_decode
from service.errors import ClientClosedError, InvalidRequestError, RequestError, TooLargeError
from service.model.manifest import Manifest
from tests import fakes

COIN, CANVAS, DOUBLER = fakes.coin().manifest(), fakes.canvas().manifest(), fakes.doubler().manifest()
HEADERS = RequestHeaders(b"")
ROWS = st.lists(
    st.one_of(
        st.lists(st.integers(0, 1) | st.floats(0, 1), min_size=2, max_size=2),
        st.fixed_dictionaries({"a": st.integers(0, 1), "b": st.floats(0, 1)}),
        st.sampled_from([[], [1], [[1, 2]], {}, {"a": "},["}, None, "],[", [1, True], [1, 1e39]]),
    ),
    max_size=6,
)
BODIES = st.builds(
    lambda rows, before, after, indent, at, cut: damage(
        json.dumps(before | {"instances": rows} | after, indent=indent).encode(), at, cut
    ),
    ROWS,
    st.sampled_from([{}, {"parameters": {"threshold": 0.5}}, {"x[": 1}, {"instances": []}]),
    st.sampled_from([{}, {"parameters": {}}, {"parameters": []}, {"]": "["}]),
    st.sampled_from([None, 1]),
    st.integers(0, 200),
    st.sampled_from([b"", b"", b"", b",", b"]", b"[", b"}"]),
)


def damage(body: bytes, at: int, more: bytes) -> bytes:
    """Return a body with some bytes more."""
    return body[:at] + more + body[at:]


@contextmanager
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Read every body in pieces, of one element each."""
    with monkeypatch.context() as patch:
        patch.setattr(v1_decode, "LARGE_BODY", 0)
        patch.setattr(json_values, "PIECE_BYTES", 1)
        yield


def read(body: bytes, manifest: Manifest) -> Any:
    """Return what a body is decoded to, or the status of its refusal."""
    try:
        call = v1_decode.decode(body, manifest, HEADERS)
    except RequestError as error:
        return error.status
    return call.inputs.tolist(), call.threshold, call.top_k


@given(BODIES)
@example(b'{"instances":[[1,2],]}')
@example(b'{"instances":[[1,2],[3,4],]}')
@example(b'{"instances":[[1,2],{"a":1,"b":[]}]}')
@example(b'{"instances":[[1,2]]}]')
def test_pieces_are_read_as_the_whole_is(body: bytes) -> None:
    """Whatever the body, its pieces give the arrays and parameters, or the refusal, that the whole gives."""
    with pytest.MonkeyPatch.context() as patch, short_pieces(patch):
        pieces = read(body, COIN)
    assert pieces == read(body, COIN)


def test_nested_pictures_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of pixels are told from pictures; an error names the picture."""
    pictures = np.random.default_rng(0).random((5, 28, 28)).round(3).tolist()
    body = json.dumps({"instances": pictures, "parameters": {"top_k": 2}}).encode()
    pictures[3][27][27] = 255
    with short_pieces(monkeypatch):
        call = v1_decode.decode(body, CANVAS, HEADERS)
        with pytest.raises(InvalidRequestError, match=r"instances\[3\]\[783\] is 255, outside \[0, 1\]"):
            v1_decode.decode(json.dumps({"instances": pictures}).encode(), CANVAS, HEADERS)
    assert call.top_k == 2
    assert call.inputs.tolist() == v1_decode.decode(body, CANVAS, HEADERS).inputs.tolist()


TENSORS = st.sampled_from([(1,), (3,), (2, 2), (3, 1), (2, 1, 3), (4, 0)]).flatmap(
    lambda shape: st.tuples(
        st.just(shape),
        st.lists(st.integers(-5, 5) | st.floats(-1, 1), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))),
        st.booleans(),
        st.integers(0, 40),
        st.sampled_from([b"", b"", b",", b"[", b"]", b" ", b"1"]),
    )
)


@given(TENSORS)
def test_pieces_of_a_tensor_are_read_as_the_whole_is(
    case: tuple[tuple[int, ...], list[float], bool, int, bytes],
) -> None:
    """A flat or nested list of numbers gives the same tensor in pieces, and is declined where the whole is."""
    shape, numbers, nests, at, more = case
    data = damage(orjson.dumps(np.reshape(numbers, shape).tolist() if nests else numbers), at, more)
    data = data.strip()  # as it is cut out of a body
    whole = parse_numbers(data, shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "PIECE_BYTES", 1)
        pieces = parse_long_numbers(data, shape, bool)
    assert (whole is None) == (pieces is None)
    if whole is not None and pieces is not None:
        np.testing.assert_array_equal(pieces, whole)


def test_name_that_comes_twice_is_refused_in_a_long_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two lists of instances neither is guessed to be meant."""
    with short_pieces(monkeypatch):
        assert read(b'{"instances":[[1,2]],"instances":[[3,4]]}', COIN) == 400


def test_reading_ends_when_nobody_waits() -> None:
    """Between two pieces the reader hears that the request is answered, and ends."""
    rows = b",".join([b"[1,2]"] * 200_000)
    for read_rows in (
        lambda check: v1_decode.decode(b'{"instances":[%b]}' % rows, COIN, HEADERS, ReadLimits(10**6, check)),
        lambda check: parse_long_numbers(b"[%b]" % rows, (200_000, 2), check),
    ):
        checks = iter([None, None, ClientClosedError("gone")])

        def check(checks: Iterator[Exception | None] = checks) -> None:
            if error := next(checks):
                raise error

        with pytest.raises(ClientClosedError):
            read_rows(check)


def test_instances_are_counted_as_they_are_read() -> None:
    """The first piece that has too many ends it; the last one is never looked at."""
    body = b'{"instances":[%b,"no instance"]}' % b",".join([b"[1,2]"] * 100_000)
    with pytest.raises(TooLargeError, match="instances; at most 4096 are taken at once"):
        v1_decode.decode(body, COIN, HEADERS, ReadLimits(4096))


def test_values_are_counted_before_they_are_built() -> None:
    """As many values as are decoded at once are; one more is refused, and so is a body that was cut off."""
    most = b"[%b]" % b",".join([b"0"] * (MAX_VALUES - 1))
    check_values(most)
    with pytest.raises(InvalidRequestError, match="the body is a list"):
        read_object(most)
    with pytest.raises(TooLargeError, match="over 524288 JSON values"):
        read_object(most.replace(b"0]", b"0,0,0]"))
    with pytest.raises(InvalidRequestError, match="its brackets do not match"):
        read_object(most.replace(b"0]", b"0,0,0"))


def test_long_lists_are_split_between_elements() -> None:
    """Pieces are of about 128 KB, whole, and nothing is lost."""
    for element in (b"[0.5, 1]", b"[[0], [1]]", b'{"a": 1}', b"0.5"):
        text = b" , ".join([element] * 50_000)
        pieces = list(split_list(text, 0, len(text)))
        assert b",".join(pieces) == text
        assert len(pieces) > 2
        assert all(len(piece) < 140_000 for piece in pieces)
        assert sum(len(orjson.loads(b"[%b]" % piece)) for piece in pieces) == 50_000


def test_long_arrays_are_written_as_short_ones_are() -> None:
    """Pieces of an array are the JSON of the whole."""
    numbers = np.random.default_rng(0).random(200_001).astype(np.float32)
    assert write_numbers(numbers) == orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)
