"""Requests and answers as ASGI has them: a body within a size and a time, whether its client still waits, an answer."""

import asyncio
from collections.abc import Callable

from starlette.types import Message, Receive, Send

from service.api.failures import encode_error, error_headers
from service.api.headers import Headers, RequestHeaders
from service.errors import DeadlineExceededError, InvalidRequestError, ServiceError, TooLargeError
from service.model.backends import Array


async def read_body(
    receive: Receive, head: RequestHeaders, limit: int, deadline: float, hold: Callable[[int], None] = lambda size: None
) -> bytes:
    """Return the whole body, giving up as soon as it is over the limit or late.

    Args:
        receive: gives the request's messages.
        head: of the request.
        limit: most bytes.
        deadline: on the event loop's clock.
        hold: told of the bytes gathered so far; may raise UnavailableError.

    Raises:
        TooLargeError: it has, or says it has, more than `limit` bytes.
        DeadlineExceededError: it did not arrive in time.
        InvalidRequestError: the client went away half-way.
    """
    if head.content_length is not None and head.content_length > limit:
        raise TooLargeError(f"the body is over the limit of {limit} bytes")
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await _receive_by(receive, deadline)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > limit:
            raise TooLargeError(f"the body is over the limit of {limit} bytes")
        hold(size)
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def wait_for_result(waiter: "asyncio.Future[Array]", receive: Receive) -> Array:
    """Return a prediction's result; give it up, so that it is not run, when its client goes first.

    Raises:
        InvalidRequestError: the client is gone.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not waiter.done():
            waiter.set_exception(InvalidRequestError("the client closed the connection before it was answered"))

    watching = asyncio.create_task(watch())
    try:
        return await waiter
    finally:
        watching.cancel()


async def send_error(send: Send, error: ServiceError, fields: Headers = ()) -> None:
    """Answer with a failure."""
    fields = [(b"content-type", b"application/json"), *fields, *error_headers(error)]
    await send_answer(send, error.status, encode_error(error), fields)


async def send_answer(send: Send, status: int, body: bytes, fields: Headers) -> None:
    """Answer with a whole body."""
    headers = [*fields, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body})


def split_fields(lines: bytes) -> Headers:
    """Return header lines as ASGI's pairs."""
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines.splitlines())]


async def _receive_by(receive: Receive, deadline: float) -> Message:
    try:
        async with asyncio.timeout_at(deadline):
            message = await receive()
    except TimeoutError:
        raise DeadlineExceededError("the body did not arrive by the request's deadline") from None
    if message["type"] == "http.disconnect":
        raise InvalidRequestError("the client closed the connection before the body was complete")
    return message
