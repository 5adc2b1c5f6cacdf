"""What Ray's HTTP servers answer by themselves, in our words: a full queue, a deadline, a replica that died.

Ray sends such failures as plain text. Each of its servers takes the middleware below where its environment has
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=service.hosts.ray_proxy:build_middlewares`.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.failures import encode_error, error_headers
from service.api.headers import Headers
from service.errors import DeadlineExceededError, ServiceError, UnavailableError

RAYS: dict[int, ServiceError] = {
    408: DeadlineExceededError("no answer was ready by the deadline"),
    500: UnavailableError("the replica that had this request is gone; try again"),
    503: UnavailableError("no replica can take the request now; try again in a moment"),
}
"""What Ray answers by itself, by its status, and what callers are told."""


class PlainErrors:
    """Middleware of Ray's HTTP servers: what Ray answers by itself gets the body and status of our own failures."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        head: Message | None = None
        told = scope["type"] != "http" or scope["path"].startswith("/-/")  # Ray's own health checks

        async def send_plain(message: Message) -> None:
            nonlocal head, told
            if not told and message["type"] == "http.response.start" and is_rays_own(message):
                head = message
                return
            if head is None:
                told = True
                await send(message)
            elif not message.get("more_body"):
                told = True
                await send_failure(send, int(head["status"]), head["headers"])

        await self._app(scope, receive, send_plain)
        if not told:  # the replica that had the request is gone
            await send_failure(send, UnavailableError.status, [])


def is_rays_own(start: Message) -> bool:
    """Tell whether a failure is Ray's: all of ours are JSON."""
    return int(start["status"]) in RAYS and (b"content-type", b"application/json") not in start["headers"]


async def send_failure(send: Send, status: int, headers: Headers) -> None:
    """Send our kind of failure in the place of one of Ray's, with the id that Ray gave the request."""
    error = RAYS[status]
    kept = [pair for pair in headers if pair[0] == b"x-request-id"]
    body = encode_error(error)
    fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send(
        {"type": "http.response.start", "status": int(error.status), "headers": fields + error_headers(error) + kept}
    )
    await send({"type": "http.response.body", "body": body})


def build_middlewares() -> list[Middleware]:
    """Return what Ray's HTTP servers wrap around themselves."""
    return [Middleware(PlainErrors)]
