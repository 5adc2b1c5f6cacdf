"""The application of the other servers: it reads the body, and answers as this service does.

`uvicorn tests.conformance.echo:app`; a body other than the cases' is a 400, and the connection stays open.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from tests.conformance.case import BODY, PREDICT

_PATHS = {PREDICT: ("POST",), "/health/live": ("GET", "HEAD"), "/v1/models": ("GET", "HEAD")}


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Answer one request."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close"})
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    methods = _PATHS.get(scope["path"])
    fields = [(b"content-type", b"application/json"), (b"content-length", b"2")]
    if methods is None:
        status = 404
    elif scope["method"] not in methods:
        status, fields = 405, [*fields, (b"allow", ", ".join(methods).encode())]
    else:
        status = 400 if scope["method"] == "POST" and body.strip() != BODY.encode() else 200
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": b"{}"})
