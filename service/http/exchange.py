"""One request that the ASGI application answers, and the response that it sends.

Source: https://asgi.readthedocs.io/en/latest/specs/www.html. Predictions do not come here; see `protocol`.
"""

import asyncio
import http
import logging
import time
from typing import TYPE_CHECKING

from starlette.types import Message, Scope

from service.api.headers import decode_path
from service.api.responses import join_fields
from service.errors import ServiceError
from service.http.head import CONNECTION_FIELDS, RequestHead

if TYPE_CHECKING:
    from service.http.connection import Connection

logger = logging.getLogger("service")

BUFFER_BYTES = 2**16  # of a body; with more that the application has not taken, nothing more is read
_STATUS_LINES = {int(status): f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
_NO_BODY = (204, 304)


class AsgiExchange:
    """A request and its response, between a connection and the ASGI application."""

    def __init__(self, connection: "Connection", head: RequestHead) -> None:
        self._connection = connection
        self._head = head
        self._began = time.perf_counter()
        self._body = b""
        self._is_complete = False  # the request
        self._is_gone = False  # the client, or the response has been taken over
        self._expects = head.expects  # until it has been told to go on
        self._news = asyncio.Event()
        self._is_paused = False
        self._started = self._ended = False  # the response
        self._keep_alive = head.keep_alive
        self._chunked = False
        self._task = connection.loop.create_task(self._run())

    @property
    def started(self) -> bool:
        """Whether a part of the response is written."""
        return self._started

    def feed(self, chunk: bytes) -> None:
        """Take a part of the body."""
        self._body += chunk
        if len(self._body) > BUFFER_BYTES:
            self._is_paused = True
            self._connection.transport.pause_reading()
        self._news.set()

    def finish(self, chunk: bytes = b"") -> None:
        """Take the last part of the body."""
        self._body += chunk
        self._is_complete = True
        self._news.set()

    def cancel(self, error: ServiceError) -> None:
        """Give the request up: its client has gone, or its body cannot be read or came too late."""
        self._is_gone = True
        self._news.set()
        transport = self._connection.transport
        if transport.is_closing() or self._ended:
            return
        if self._started:
            transport.abort()
        else:
            self._fail(error)

    def _fail(self, error: ServiceError) -> None:
        """Respond in the application's place."""
        self._started = self._ended = True
        path, seconds = decode_path(self._head.target), time.perf_counter() - self._began
        self._connection.fail(error, self._head.method, path, seconds)

    async def _run(self) -> None:
        try:
            await self._connection.app(self._build_scope(), self._receive, self._send)
        except Exception as error:
            logger.exception("the application failed to answer %s", decode_path(self._head.target))
            failure = ServiceError(repr(error))
        else:
            failure = ServiceError("the application ended without a response")
        if self._ended or self._is_gone:
            return
        if self._started:
            self._connection.transport.abort()
        else:
            self._fail(failure)

    def _build_scope(self) -> Scope:
        head, transport = self._head, self._connection.transport
        path, _, query = head.target.partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head.version,
            "method": head.method,
            "scheme": "http",
            "path": decode_path(path),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": head.fields,
            "client": (transport.get_extra_info("peername") or (None,))[:2],
            "server": (transport.get_extra_info("sockname") or (None,))[:2],
        }

    async def _receive(self) -> Message:
        """Return the next part of the body, or that the client has gone."""
        if self._expects and not self._is_complete and not self._started:
            self._expects = False
            self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._is_paused:
            self._is_paused = False
            self._connection.transport.resume_reading()
        await self._news.wait()
        self._news.clear()
        if self._is_gone or self._ended:
            self._news.set()
            return {"type": "http.disconnect"}
        body, self._body = self._body, b""
        return {"type": "http.request", "body": body, "more_body": not self._is_complete}

    async def _send(self, message: Message) -> None:
        """Write a part of the response, when the client reads."""
        await self._connection.can_write.wait()
        if self._is_gone or self._connection.transport.is_closing():
            return
        if message["type"] == "http.response.start":
            self._started = True
            self._connection.transport.write(self._build_head(int(message["status"]), list(message["headers"])))
            return
        has_body = self._head.method != "HEAD"
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._chunked and has_body:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"" if more else b"0\r\n\r\n")
        if body and has_body:
            self._connection.transport.write(body)
        if not more:
            self._ended = True
            self._news.set()
            self._connection.complete_response(self._keep_alive)

    def _build_head(self, status: int, fields: list[tuple[bytes, bytes]]) -> bytes:
        names = {name.lower() for name, _ in fields}
        if b"content-length" not in names and status not in _NO_BODY:
            self._chunked = self._head.version != "1.0"
            if self._chunked:
                fields.append((b"transfer-encoding", b"chunked"))
            else:  # only the end of the connection tells where the response ends
                self._keep_alive = False
        # A client that still waits for `100 Continue` may never send its body.
        if self._connection.app.draining or (self._expects and not self._is_complete):
            self._keep_alive = False
        connection = CONNECTION_FIELDS[self._keep_alive, self._head.version]
        date = self._connection.app.date
        return b"%b%b%b%b\r\n" % (_STATUS_LINES[status], date, join_fields(fields), connection)
