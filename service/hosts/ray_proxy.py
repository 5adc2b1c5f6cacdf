"""Gives the errors of Ray's HTTP proxies the form of our own: a full queue, a deadline, a replica that died.

Ray sends them as plain text. Its proxies use the middleware below if their environment has
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=service.hosts.ray_proxy:build_middlewares`.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.headers import Headers
from service.api.responses import build_error_response, split_fields
from service.errors import DeadlineExceededError, ServiceError, UnavailableError

RAY_ERRORS: dict[int, ServiceError] = {
    408: DeadlineExceededError("no answer was ready by the deadline"),
    500: UnavailableError("the replica that had this request is gone; try again"),
    503: UnavailableError("no replica can take the request now; try again in a moment"),
}
"""Our error for each status that Ray answers by itself."""


class RayErrors:
    """ASGI middleware for Ray's proxies that replaces Ray's own error responses by ours."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # the lifespan, and Ray's own health checks
            await self._app(scope, receive, send)
            return
        responded = replaced = False

        async def send_or_replace(message: Message) -> None:
            nonlocal responded, replaced
            if replaced:
                return
            if not responded and is_from_ray(message):
                replaced = True
                await send_error(send, message["status"], message["headers"])
            else:
                await send(message)
            responded = True

        await self._app(scope, receive, send_or_replace)
        if not responded:  # the replica has died
            await send_error(send, UnavailableError.status, [])


def is_from_ray(start: Message) -> bool:
    """Tell whether a response is an error of Ray's own: all of ours are JSON."""
    return start["status"] in RAY_ERRORS and (b"content-type", b"application/json") not in start["headers"]


async def send_error(send: Send, status: int, headers: Headers) -> None:
    """Send our error instead of Ray's, with the request id that Ray assigned."""
    response = build_error_response(RAY_ERRORS[status])
    fields = [
        *split_fields(response.fields),
        (b"content-length", b"%d" % len(response.body)),
        *(pair for pair in headers if pair[0] == b"x-request-id"),
    ]
    await send({"type": "http.response.start", "status": int(response.status), "headers": fields})
    await send({"type": "http.response.body", "body": response.body})


def build_middlewares() -> list[Middleware]:
    """Return the middlewares for Ray's proxies."""
    return [Middleware(RayErrors)]
