"""Call an ASGI application without a server, to see what it does with each message."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
from starlette.types import ASGIApp, Message, Scope

SECONDS = 20  # until a request that is never answered fails its test
Body = bytes | Sequence[Message]
"""A whole body, or its messages, to the letter."""
Result = TypeVar("Result")


@dataclass
class Answer:
    """What the application sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        """Return the decoded body."""
        return orjson.loads(self.body)


class Client:
    """Sends requests to an application, all on one event loop, as a server does; `close` ends the loop."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._runner = asyncio.Runner()

    def request(self, method: str, path: str, body: Body = b"", headers: Iterable[tuple[str, str]] = ()) -> Answer:
        """Send one request and return the answer."""
        return self.run(call(self.app, method, path, body, headers))

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the client's loop."""
        return self._runner.run(asyncio.wait_for(coroutine, SECONDS))

    def close(self) -> None:
        """End the loop."""
        self._runner.close()


async def call(
    app: ASGIApp, method: str, path: str, body: Body = b"", headers: Iterable[tuple[str, str]] = ()
) -> Answer:
    """Send one request on the running event loop; once the messages are used up, no more ever comes."""
    messages = [{"type": "http.request", "body": body}] if isinstance(body, bytes) else list(body)
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    answer = Answer()

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    await app(scope, receive, send)
    return answer
