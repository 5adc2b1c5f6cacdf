"""JSON of a request: parsed fast to numbers, decoded to an object, and what to call a value in an error.

The readers hold the interpreter's lock while they parse, 5 ms for a megabyte. So a long list is read in pieces, with a
pause after each in which other threads get a turn; this also bounds what is built of it before it is checked.
"""

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import orjson
from numpy.typing import NDArray

from service.api.limits import check_values
from service.errors import InvalidRequestError

try:
    import simdjson
except ImportError:  # there is no wheel for this Python: orjson reads every body
    simdjson = None  # type: ignore[assignment]

LARGE_BODY = 2**18  # bytes; decoding such a body would hold the event loop for a millisecond or more
PIECE_NUMBERS = 2**16  # that are written at a time
PIECE_BYTES = 2**16  # that are read at a time
_PAUSE_SECONDS = 0.0001  # gives the interpreter's lock away; only asking for it back would slow the event loop
_OPENING = re.compile(rb"\s*(\{|(?:\[\s*){0,8})")


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


def split_list(text: bytes, start: int, end: int) -> Iterator[bytes]:
    """Yield what stands between a JSON list's brackets in pieces of about 64 KB, with a pause after each.

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
