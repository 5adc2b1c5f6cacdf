"""A request's body as ASGI gives it, within a size and a time."""

import asyncio

from starlette.types import Message, Receive

from service.api.head import RequestHead
from service.errors import DeadlineExceededError, InvalidRequestError, TooLargeError


async def read_body(receive: Receive, head: RequestHead, limit: int, deadline: float) -> bytes:
    """Return the whole body, giving up as soon as it is over the limit or late.

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
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def _receive_by(receive: Receive, deadline: float) -> Message:
    try:
        async with asyncio.timeout_at(deadline):
            message = await receive()
    except TimeoutError:
        raise DeadlineExceededError("the body did not arrive by the request's deadline") from None
    if message["type"] == "http.disconnect":
        raise InvalidRequestError("the client closed the connection before the body was complete")
    return message
