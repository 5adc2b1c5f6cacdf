"""JSON of a request: parsed fast to numbers, decoded to an object, and what to call a value in an error.

The readers hold the interpreter's lock while they parse, 5 ms for a megabyte. So a long list is read in pieces, with a
pause after each in which other threads get a turn; this also bounds what is built of it before it is checked.
"""

import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.api.limits import MAX_VALUES, check_values
from service.errors import InvalidRequestError

try:
    import simdjson
except ImportError:  # there is no wheel for this Python: orjson reads every body
    simdjson = None  # type: ignore[assignment]

LARGE_BODY = 2**18  # bytes; decoding such a body would hold the event loop for a millisecond or more
PIECE_NUMBERS = 2**16  # that are written at a time
PIECE_BYTES = 2**17  # that are read at a time
_PAUSE_SECONDS = 0.0001  # gives the interpreter's lock away; only asking for it back would slow the event loop
_OPENING = re.compile(rb"\s*(\{|(?:\[\s*){0,8})")
_ONE_BITS = np.float64(1).view(np.uint64)
_LARGEST_BITS = np.float64(np.finfo(np.float32).max).view(np.uint64)
_ABSOLUTE_BITS = np.uint64(2**63 - 1)


class FastJson(threading.local):
    """Each thread's simdjson parser (https://arxiv.org/abs/1902.08318), kept because a new one costs 1 µs.

    Nothing of a document may be alive when the same thread parses the next one.
    """

    def __init__(self) -> None:
        self.parse: Any = simdjson.Parser().parse if simdjson is not None else None


fast_json = FastJson()


def read_object(body: bytes, wanted: str = "an object") -> dict[str, Any]:
    """Return the JSON object that a body is.

    Raises:
        InvalidRequestError: it is not JSON, or another kind of value; `wanted` says what was expected.
        TooLargeError: it has too many values.
    """
    check_values(body)
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"the body is {kind_of(fields)}, expected {wanted}")
    return fields


def parse_numbers(text: bytes, shape: tuple[int, ...], is_unit: bool = False) -> NDArray[np.float32] | None:
    """Return a JSON list of numbers as float32 of a shape, without a Python object per number.

    Args:
        text: the bytes of the list, flat or nested as the shape says; a first size of -1 is whatever the list has.
        shape: of the array.
        is_unit: whether the numbers have to be in [0, 1].

    Returns:
        None for anything else, also a number that float32 cannot hold: the caller has the sentence for what is wrong.
        It may decline a number on the edge of a range.
    """
    if fast_json.parse is None:
        return None
    try:
        values = fast_json.parse(text)
        numbers = np.frombuffer(values.as_buffer(of_type="d"), dtype=np.float64)  # it flattens
        is_nested = text.find(b"[", 1) >= 0
        if shape[:1] == (-1,):
            shape = (len(values) if is_nested else numbers.size // math.prod(shape[1:]), *shape[1:])
        if not 0 < numbers.size == math.prod(shape) or (is_nested and not _has_nesting(values, text, shape)):
            return None
    except (ValueError, TypeError, AttributeError, RuntimeError):  # what simdjson raises, and numpy for an empty list
        return None
    # Non-negative IEEE 754 numbers are ordered as their bits are, and a sign, an infinity or a NaN has larger bits:
    # one pass over the bits does the work of two comparisons and a test for NaN. `argmax` costs a quarter of `max`.
    bits = numbers.view(np.uint64) if is_unit else numbers.view(np.uint64) & _ABSOLUTE_BITS
    is_in_range = bits[bits.argmax()] <= (_ONE_BITS if is_unit else _LARGEST_BITS)
    return numbers.astype(np.float32).reshape(shape) if is_in_range else None


def _has_nesting(values: Any, text: bytes, shape: tuple[int, ...]) -> bool:  # noqa: ANN401 - a list of simdjson's
    """Tell whether a list of simdjson's is nested as a shape says: its lists have those lengths, and it has no other.

    Raises:
        TypeError: where a list should be there is a number.
    """
    if (len(values),) != shape[:1]:
        return False
    lists = [values]
    start = 1  # behind the first bracket
    for size in shape[1:]:
        lists = list(chain.from_iterable(lists))
        if set(map(len, lists)) != {size}:
            return False
        for _ in lists:  # `bytes.count` of a single byte takes ten times as long
            start = text.find(b"[", start) + 1
    return text.find(b"[", start) < 0


def parse_long_numbers(text: bytes, shape: tuple[int, ...], check: Callable[[], object]) -> NDArray[np.float32] | None:
    """Do what `parse_numbers` does in pieces, calling `check` before each.

    Raises:
        TooLargeError: a piece has more numbers than the shape.
    """
    count = math.prod(shape)
    if not count or text[:1] != b"[":
        return None
    rest = shape[1:] if text[1:100].lstrip()[:1] == b"[" else ()
    pieces: list[NDArray[np.float32]] = []
    for piece in split_list(text, 1, len(text) - 1):
        check()
        check_values(piece, max(MAX_VALUES, 2 * count))
        numbers = parse_numbers(b"[%b]" % piece, (-1, *rest))
        if numbers is None or numbers.size > count:
            return None
        pieces.append(numbers.reshape(-1))
        count -= numbers.size
    return np.concatenate(pieces).reshape(shape) if count == 0 else None


def split_list(text: bytes, start: int, end: int) -> Iterator[bytes]:
    """Yield what stands between a JSON list's brackets in pieces of about 128 KB, with a pause after each.

    A piece ends with an element, as long as all elements are nested as deep as the first; if they are not, it may end
    within one, and is not valid JSON. Where all pieces are lists of elements, their elements are the list's.
    """
    opening = _OPENING.match(text, start, end)
    assert opening is not None  # it matches nothing, too
    closing = rb"\}\s*" if opening[1] == b"{" else rb"\]\s*" * opening[1].count(b"[")
    border = re.compile(closing + b",")
    while found := border.search(text, start + PIECE_BYTES, end):
        yield text[start : found.end() - 1]
        start = found.end()
        time.sleep(_PAUSE_SECONDS)
    yield text[start:end]


def write_numbers(numbers: NDArray[Any]) -> bytes:
    """Return a long array (N,) as JSON, written in pieces with a pause after each, as long lists are read."""
    pieces: list[bytes] = []
    for start in range(0, len(numbers), PIECE_NUMBERS):
        pieces.append(orjson.dumps(numbers[start : start + PIECE_NUMBERS], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
        time.sleep(_PAUSE_SECONDS)
    return b"[%b]" % b",".join(pieces)


def kind_of(value: object) -> str:
    """Return what a decoded JSON value is, in JSON's words."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds[type(value)]
