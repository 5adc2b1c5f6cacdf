"""JSON values of a request: the object that a body is, and what to call a value in an error."""

from typing import Any

import orjson

from service.errors import InvalidRequestError


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
