"""JSON of a request: parsed fast to numbers, decoded to an object, and what to call a value in an error."""

import threading
from typing import Any

import orjson

from service.errors import InvalidRequestError

try:
    import simdjson
except ImportError:  # there is no wheel for this Python: orjson reads every body
    simdjson = None  # type: ignore[assignment]

LARGE_BODY = 2**18  # bytes; decoding such a body would hold the event loop for a millisecond or more


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
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"the body is {kind_of(fields)}, expected {wanted}")
    return fields


def kind_of(value: object) -> str:
    """Return what a decoded JSON value is, in JSON's words."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds[type(value)]
