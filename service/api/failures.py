"""Failures on the wire: a status, `{"error": one sentence}`, and the header fields that belong to the status."""

import logging

import orjson

from service.errors import MethodNotAllowedError, ServiceError, UnauthorizedError, UnavailableError

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
