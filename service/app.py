"""The service as one ASGI application (https://asgi.readthedocs.io): it owns no socket and no process.

Predictions take a lane of their own, straight from bytes to bytes; everything else goes to Starlette. Both give every
answer an `X-Request-ID` and every failure the body `{"error": sentence}`.
"""

import asyncio
import hmac
import itertools
import logging
import os
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import typed
from service.api.operations import build_routes
from service.backends import Array
from service.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    ServiceError,
    TooLargeError,
    UnauthorizedError,
    UnavailableError,
    UnsupportedMediaError,
)
from service.manifest import Manifest
from service.repository import Repository
from service.settings import Settings

logger = logging.getLogger("service")

Headers = Iterable[tuple[bytes, bytes]]
_PREDICT = re.compile(r"/v1/models/([^/:]+)(?:/versions/([^/:]+))?:predict")
_OPEN_PATHS = ("/health/live", "/health/ready")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:+/=-]{1,128}")
_LARGE_BODY = 2**18


@dataclass(frozen=True, slots=True)
class RequestHead:
    """What the service reads of a request's header fields."""

    request_id: bytes
    content_type: bytes = b""
    content_encoding: bytes = b""
    content_length: int | None = None
    key: bytes = b""


class Application:
    """The ASGI callable that `create_app` returns; `repository` is what it serves."""

    def __init__(self, settings: Settings, repository: Repository) -> None:
        self.repository = repository
        self._settings = settings
        self._keys = [key.strip().encode() for key in settings.api_key.split(",") if key.strip()]
        self._others = _build_starlette(repository)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] != "http":
            await self._others(scope, receive, send)
            return
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        head = read_head(scope["headers"])
        match = _PREDICT.fullmatch(path)
        if match is None:
            await self._operate(path, head, scope, receive, send)
        else:
            await self._predict(match, head, scope, receive, send)

    async def _predict(
        self, match: re.Match[str], head: RequestHead, scope: Scope, receive: Receive, send: Send
    ) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.request_timeout
        try:
            self.check_key(head)
            if scope["method"] != "POST":
                raise MethodNotAllowedError(f"{scope['method']} is not answered here; send POST with a JSON body")
            served = self.repository.get(match[1], match[2])
            check_media(head)
            body = await read_body(receive, head, self._settings.max_request_bytes, deadline)
            call = await _decode(body, served.manifest, loop)
            waiter: asyncio.Future[Array] = loop.create_future()
            served.batcher.submit(call.inputs, deadline, waiter)
            answer = typed.encode_results(await waiter, served.manifest, call)
        except Exception as error:  # whatever happens, the caller gets a sentence and not a stack
            await _send_error(send, as_service_error(error, head), head)
            return
        await _send_json(send, 200, answer, head)

    async def _operate(self, path: str, head: RequestHead, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", head.request_id)]
            await send(message)

        scope["state"] = scope.get("state", {}) | {"head": head}
        try:
            if path not in _OPEN_PATHS:
                self.check_key(head)
        except UnauthorizedError as error:
            await _send_error(send, error, head)
            return
        await self._others(scope, receive, send_with_id)

    def check_key(self, head: RequestHead) -> None:
        """Refuse a request without one of the keys, where keys are set, in time that tells nothing of the keys.

        Raises:
            UnauthorizedError: no key, or not one of ours.
        """
        if self._keys and not sum(hmac.compare_digest(head.key, key) for key in self._keys):  # all compared, always
            sent = "this key is not valid" if head.key else "a key is needed"
            raise UnauthorizedError(f"{sent}; send it as X-API-Key, or as Authorization: Bearer")


def create_app(settings: Settings, threads: int = 1, preferred_device: str = "cuda:0") -> Application:
    """Load the models and return the application that serves them.

    Args:
        settings: how to run.
        threads: CPU threads that one backend call may use.
        preferred_device: the accelerator that "auto" takes where there are several.

    Raises:
        StartError: the models folder or the device asked for is not there.
    """
    repository = Repository(settings, threads, preferred_device)
    repository.load()
    return Application(settings, repository)


def read_head(headers: Headers) -> RequestHead:
    """Pick the header fields that matter; make a request id where none, or an unusable one, was sent."""
    fields = dict(headers)
    sent = fields.get(b"x-request-id", b"")
    length = fields.get(b"content-length", b"")
    key = fields.get(b"x-api-key", b"")
    if not key and fields.get(b"authorization", b"")[:7].lower() == b"bearer ":
        key = fields[b"authorization"][7:].strip()
    return RequestHead(
        request_id=sent if sent and _REQUEST_ID.fullmatch(sent) else new_request_id(),
        content_type=fields.get(b"content-type", b""),
        content_encoding=fields.get(b"content-encoding", b""),
        content_length=int(length) if length.isdigit() else None,
        key=key,
    )


_count = itertools.count()
_prefix = os.urandom(6).hex()
os.register_at_fork(after_in_child=lambda: globals().update(_prefix=os.urandom(6).hex()))


def new_request_id() -> bytes:
    """Return an id no other request of any worker has: a random prefix per process, and a counter."""
    return f"{_prefix}-{next(_count):x}".encode()


def check_media(head: RequestHead) -> None:
    """Refuse bodies that are not plain JSON.

    Raises:
        UnsupportedMediaError: another content type, or a content encoding.
    """
    kind = head.content_type.partition(b";")[0].strip().lower()
    if kind not in (b"application/json", b""):
        shown = kind[:60].decode("latin-1")
        raise UnsupportedMediaError(f"content type {shown} is not read here; send Content-Type: application/json")
    if head.content_encoding not in (b"", b"identity"):
        shown = head.content_encoding[:60].decode("latin-1")
        raise UnsupportedMediaError(f"content encoding {shown} is not read here; send the body as it is")


async def read_body(receive: Receive, head: RequestHead, limit: int, deadline: float) -> bytes:
    """Return the whole body, giving up as soon as it is over the limit or late.

    Raises:
        TooLargeError: it has, or says it has, more than `limit` bytes.
        DeadlineExceededError: it did not arrive in time.
        InvalidRequestError: the client went away half-way.
    """
    too_large = TooLargeError(f"the body is over the limit of {limit} bytes")
    if head.content_length is not None and head.content_length > limit:
        raise too_large
    message = await _receive_by(receive, deadline)
    if not message.get("more_body"):
        body: bytes = message.get("body", b"")
        if len(body) > limit:
            raise too_large
        return body
    parts, size = [message.get("body", b"")], len(message.get("body", b""))
    while message.get("more_body"):
        message = await _receive_by(receive, deadline)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise too_large
    return b"".join(parts)


async def _receive_by(receive: Receive, deadline: float) -> Message:
    try:
        async with asyncio.timeout_at(deadline):
            message = await receive()
    except TimeoutError:
        raise DeadlineExceededError("the body did not arrive by the request's deadline") from None
    if message["type"] == "http.disconnect":
        raise InvalidRequestError("the client closed the connection before the body was complete")
    return message


async def _decode(body: bytes, manifest: Manifest, loop: asyncio.AbstractEventLoop) -> typed.Call:
    if len(body) < _LARGE_BODY:
        return typed.decode_call(body, manifest)
    return await loop.run_in_executor(None, typed.decode_call, body, manifest)


def as_service_error(error: Exception, head: RequestHead) -> ServiceError:
    """Return the failure to answer with; what is not the caller's doing is logged with the request's id."""
    status = error.status if isinstance(error, ServiceError) else ServiceError.status
    if status == ServiceError.status:
        logger.error("request %s failed", head.request_id.decode(), exc_info=error)
    return error if isinstance(error, ServiceError) else ServiceError(repr(error))


def _build_starlette(repository: Repository) -> ASGIApp:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        del app
        yield
        repository.close()

    async def answer_error(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = _explain(request, error.status_code)
        found = as_service_error(error, request.state.head)
        return Response(typed.encode_error(found), found.status, dict(_extra(found)), "application/json")

    handlers = {ServiceError: answer_error, HTTPException: answer_error, Exception: answer_error}
    return Starlette(routes=build_routes(repository), exception_handlers=handlers, lifespan=lifespan)


def _explain(request: Request, status: int) -> ServiceError:
    path = request.url.path
    if status == MethodNotAllowedError.status:
        return MethodNotAllowedError(f"{request.method} is not answered at {path}; it answers GET")
    if status == NotFoundError.status:
        return NotFoundError(f"there is nothing at {path}; see /docs for what there is")
    return InvalidRequestError(f"the request to {path} cannot be answered ({status})")


def _extra(error: ServiceError) -> list[tuple[str, str]]:
    if isinstance(error, UnavailableError):
        return [("retry-after", str(error.retry_after))]
    if isinstance(error, UnauthorizedError):
        return [("www-authenticate", "Bearer")]
    if isinstance(error, MethodNotAllowedError):
        return [("allow", "POST" if "POST" in str(error) else "GET, HEAD")]
    return []


async def _send_error(send: Send, error: ServiceError, head: RequestHead) -> None:
    extra = [(name.encode(), value.encode()) for name, value in _extra(error)]
    await _send_json(send, error.status, typed.encode_error(error), head, extra)


async def _send_json(send: Send, status: int, body: bytes, head: RequestHead, extra: Headers = ()) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", head.request_id),
        *extra,
    ]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body})
