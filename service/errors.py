"""Every way a request or a model can fail, in the order of the data path.

ServiceError
├── RequestError            the caller can mend it; `status` is the answer's HTTP status
│   ├── InvalidRequestError      400  decode: body, values, parameters; values without a finite answer
│   ├── UnauthorizedError        401  key missing or wrong
│   ├── ForbiddenError           403  access: a web page of another site, or a Host that is not allowed
│   ├── NotFoundError            404  registry: no such model or version
│   ├── MethodNotAllowedError    405  api: the path answers other methods
│   ├── TooLargeError            413  request: body over the limit
│   ├── UnsupportedMediaError    415  api: content type or encoding not understood
│   ├── HeadTooLargeError        431  http: too many or too long header fields
│   └── ClientClosedError        499  http: the client closed the connection; logged and counted, never sent
├── UnavailableError        503  registry or batching: loading, full, draining; `Retry-After` is sent
├── DeadlineExceededError   504  batching: no answer by the request's deadline
├── InferenceError          500  backend: the graph raised, or gave other than (N, K)
│   └── DeviceLostError          500  backend: the GPU failed for the whole process
├── ModelRefusedError       never an answer: a version that fails a check and so is not served
└── StartError              never an answer: the service cannot start as configured
"""

from http import HTTPStatus

from pydantic import ValidationError


class ServiceError(Exception):
    """Base of all failures that this package raises on purpose; `str()` of one is a sentence fit for its reader."""

    status: int = HTTPStatus.INTERNAL_SERVER_ERROR


class RequestError(ServiceError):
    """The request is at fault; its sentence says what and where."""

    status: int = HTTPStatus.BAD_REQUEST


class InvalidRequestError(RequestError):
    """The body or a value in it cannot be used."""


class UnauthorizedError(RequestError):
    """The key is missing or wrong."""

    status = HTTPStatus.UNAUTHORIZED


class ForbiddenError(RequestError):
    """A web page of another site sent it, or it names a host that is not allowed."""

    status = HTTPStatus.FORBIDDEN


class NotFoundError(RequestError):
    """There is no such model, version or path."""

    status = HTTPStatus.NOT_FOUND


class MethodNotAllowedError(RequestError):
    """The path exists and answers other methods, those in `allow`, which become the header of that name."""

    status = HTTPStatus.METHOD_NOT_ALLOWED

    def __init__(self, sentence: str, allow: str) -> None:
        super().__init__(sentence)
        self.allow = allow


class TooLargeError(RequestError):
    """The body is over the limit."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class UnsupportedMediaError(RequestError):
    """The content type or encoding is not one that the path reads."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class HeadTooLargeError(RequestError):
    """The request's head has too many or too long fields."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE


class ClientClosedError(RequestError):
    """The client closed the connection before its answer; 499 is what nginx logs for that."""

    status = 499


class UnavailableError(ServiceError):
    """The service cannot take the request now and may in `retry_after` seconds."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    retry_after = 1


class DeadlineExceededError(ServiceError):
    """No answer was ready by the request's deadline."""

    status = HTTPStatus.GATEWAY_TIMEOUT


class InferenceError(ServiceError):
    """The backend failed or gave an unusable output; the caller learns no more than that."""


class DeviceLostError(InferenceError):
    """The GPU failed in a way after which every call of this process fails; only another process can use it again."""


class ModelRefusedError(ServiceError):
    """A version failed a check of its manifest, digest, parity or golden samples.

    `retry_at`, in seconds of the monotonic clock, says when it is tried again though its files stay the same; 0: never.
    """

    retry_at = 0.0


class StartError(ServiceError):
    """The service cannot start as configured."""


def describe_invalid(error: ValidationError, of: str = "a manifest") -> str:
    """Return the first problem of a pydantic error as one sentence that names the field; `of` has the fields."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where} is not a field of {of}"
    if first["type"] == "literal_error" and where == "task":  # pydantic was only asked about models that have a task
        return (
            "task is none of 'regression', 'binary', 'multiclass', 'multilabel', 'embedding', 'outputs' and 'tensors'"
        )
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
