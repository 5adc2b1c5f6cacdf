"""Responses: a status, header lines and a body, and how a failure becomes `{"error": one sentence}`."""

import logging
from typing import NamedTuple

import orjson
from starlette.exceptions import HTTPException

from service.api.headers import Headers
from service.errors import (
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    ServiceError,
    UnauthorizedError,
    UnavailableError,
)

logger = logging.getLogger("service")


class Response(NamedTuple):
    """A whole response. `fields` are header lines, each with its CRLF; Content-Length is added when it is written.

    `closes` asks for the connection to be closed, because the rest of the request is not worth reading.
    """

    status: int
    fields: bytes
    body: bytes
    closes: bool = False


def build_error_response(error: ServiceError, fields: bytes = b"", closes: bool = False) -> Response:
    """Return the response of a failure, with `fields` added to its header lines."""
    lines = join_fields(error_headers(error))
    return Response(error.status, b"content-type: application/json\r\n" + lines + fields, encode_error(error), closes)


def as_service_error(error: BaseException | None, request_id: bytes) -> ServiceError:
    """Return the failure to respond with; one that is not the caller's fault is logged with the request's id."""
    status = error.status if isinstance(error, ServiceError) else ServiceError.status
    if status == ServiceError.status:
        logger.error("request %s failed", request_id.decode(), exc_info=error)
    return error if isinstance(error, ServiceError) else ServiceError(repr(error))


def encode_error(error: ServiceError) -> bytes:
    """Return the body of an error response; a 500 carries no internals."""
    sentence = str(error) if error.status != ServiceError.status else "the model failed to answer this request"
    return orjson.dumps({"error": sentence})


def error_headers(error: ServiceError) -> list[tuple[bytes, bytes]]:
    """Return the header fields that RFC 9110 asks for with a status."""
    if isinstance(error, UnavailableError):
        return [(b"retry-after", b"%d" % error.retry_after)]
    if isinstance(error, UnauthorizedError):
        return [(b"www-authenticate", b"Bearer")]
    if isinstance(error, MethodNotAllowedError):
        return [(b"allow", error.allow.encode())]
    return []


def join_fields(fields: Headers) -> bytes:
    """Return header fields as lines."""
    return b"".join(b"%b: %b\r\n" % field for field in fields)


def split_fields(lines: bytes) -> list[tuple[bytes, bytes]]:
    """Return header lines as pairs, as ASGI has them."""
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines.splitlines())]


def explain(method: str, path: str, error: HTTPException) -> ServiceError:
    """Return the failure that says in a sentence what Starlette says in a status."""
    is_action = ":" in path and path.startswith(("/v1/models/", "/v2/models/"))  # the route takes it for a name
    if is_action or error.status_code == NotFoundError.status:
        hint = "models below /v1 have :predict and :preview" if is_action else "see /docs for what there is"
        return NotFoundError(f"there is nothing at {path}; {hint}")
    if error.status_code == MethodNotAllowedError.status:
        named = (error.headers or {}).get("Allow", "GET, HEAD")
        allowed = ", ".join(sorted(named.split(", ")))  # Starlette joins a set, in an order of its own
        return MethodNotAllowedError(f"{method} is not answered at {path}; it answers {allowed}", allow=allowed)
    return InvalidRequestError(f"the request to {path} cannot be answered ({error.status_code})")
