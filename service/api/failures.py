"""Failures on the wire: a status, `{"error": one sentence}`, and the header fields that belong to the status."""

import logging

import orjson
from starlette.exceptions import HTTPException

from service.errors import (
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    ServiceError,
    UnauthorizedError,
    UnavailableError,
)

logger = logging.getLogger("service")


def as_service_error(error: Exception, request_id: bytes) -> ServiceError:
    """Return the failure to answer with; what is not the caller's doing is logged under the request's id."""
    status = error.status if isinstance(error, ServiceError) else ServiceError.status
    if status == ServiceError.status:
        logger.error("request %s failed", request_id.decode(), exc_info=error)
    return error if isinstance(error, ServiceError) else ServiceError(repr(error))


def encode_error(error: ServiceError) -> bytes:
    """Return the body of an error answer, without internals for the service's own failures."""
    sentence = str(error) if error.status != ServiceError.status else "the model failed to answer this request"
    return orjson.dumps({"error": sentence})


def error_headers(error: ServiceError) -> list[tuple[bytes, bytes]]:
    """Return the header fields that RFC 9110 wants beside a status."""
    if isinstance(error, UnavailableError):
        return [(b"retry-after", b"%d" % error.retry_after)]
    if isinstance(error, UnauthorizedError):
        return [(b"www-authenticate", b"Bearer")]
    if isinstance(error, MethodNotAllowedError):
        return [(b"allow", error.allow.encode())]
    return []


def explain(method: str, path: str, error: HTTPException) -> ServiceError:
    """Return the failure that says in a sentence what Starlette says in a status."""
    if error.status_code == MethodNotAllowedError.status:
        allowed = (error.headers or {}).get("Allow", "GET, HEAD")
        return MethodNotAllowedError(f"{method} is not answered at {path}; it answers {allowed}", allow=allowed)
    if error.status_code == NotFoundError.status:
        return NotFoundError(f"there is nothing at {path}; see /docs for what there is")
    return InvalidRequestError(f"the request to {path} cannot be answered ({error.status_code})")
