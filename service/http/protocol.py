"""HTTP/1.1 on httptools (llhttp): one connection, its requests in order, and their limits.

A prediction is driven from the parser's callbacks: no task, no ASGI scope, one write. Everything else runs as ASGI; see
`exchange`. What a response says is decided by `service.app` and `service.request` in both cases.

The parser cannot be paused, so what it finds behind a request that has no response yet is kept as events, in order, and
nothing more is read until they have been handled. Sources: RFC 9110 (semantics) and RFC 9112 (HTTP/1.1).
"""

import asyncio
import http
from collections import deque
from enum import Enum, auto

import httptools

from service.api.headers import match_target, new_request_id, read_headers
from service.api.responses import Response, build_error_response
from service.app import Application
from service.errors import ClientClosedError, HeadTooLargeError, InvalidRequestError, ServiceError, UnavailableError
from service.http.exchange import AsgiExchange, RequestHead
from service.request import PredictRequest
from service.telemetry.recorder import Answered

MAX_HEAD_BYTES = 2**16
MAX_HEADER_FIELDS = 100
PIECE_BYTES = 2**14  # parsed at a time: bounds how many requests are found behind one that has no response yet
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_HEAD_TOO_LONG = f"the request's head is over the limit of {MAX_HEAD_BYTES} bytes"
_CHUNKS_TOO_LONG = f"the request has over {MAX_HEAD_BYTES} bytes of chunk extensions or trailer fields"
_STATUS_LINES = {int(status): f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
_NO_HEAD = RequestHead("", b"", [], "1.1", True, False)
_Event = RequestHead | bytes | ServiceError | None  # a head, a part of a body, bytes that are not HTTP, a body's end


class State(Enum):
    """What a connection is doing."""

    IDLE = auto()  # between two requests
    READING_HEAD = auto()
    READING_BODY = auto()
    WAITING = auto()  # for the response to a complete request
    DRAINING = auto()  # the last response is written; a client that still sends gets a moment to read it
    CLOSING = auto()


class HttpProtocol(asyncio.Protocol):
    """One connection.

    Args:
        app: answers the requests.
        connections: lists the connection while it is open.
    """

    transport: asyncio.Transport

    def __init__(self, app: Application, connections: set["HttpProtocol"]) -> None:
        self.app = app
        self.connections = connections
        self.loop = asyncio.get_running_loop()
        self.state = State.READING_HEAD
        self.since = self.loop.time()  # when the state began
        self.current: PredictRequest | AsgiExchange | None = None
        self.stalled_since: float | None = None  # since when the client reads none of the responses that wait for it
        self.unsent = 0  # bytes of those responses, when they were last looked at
        self.can_write = asyncio.Event()
        self.can_write.set()
        # Of the current request:
        self._head = _NO_HEAD
        self._keep_alive = True
        self._responded = False
        self._chunk = b""  # of its body, held back
        # Of the parser, which may be ahead of the current request:
        self._events: deque[_Event] = deque()
        self._unparsed = b""
        self._in_message = self._in_body = self._is_last = self._is_replaying = False
        self._keeps_alive = True
        self._framing_bytes = self._body_bytes = 0
        self._target, self._fields, self._expects = b"", list[tuple[bytes, bytes]](), False
        self._open_parser()

    def _open_parser(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        # Bytes behind a request with `Connection: close` are dropped, not refused.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)

    # Callbacks of the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # TCP has no other
        """Begin a connection, or refuse it where there are too many."""
        self.transport = transport
        self.connections.add(self)
        self.app.arrival.set()
        if len(self.connections) > self.app.settings.max_connections:
            self.state = State.WAITING  # nothing is read of it
            self.fail(UnavailableError("there are too many open connections; try again in a moment"))

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection; a request without a response is given up."""
        del exc
        self.connections.discard(self)
        self.state = State.CLOSING
        self.can_write.set()
        if self.current is not None and not self._responded:
            self.current.cancel(ClientClosedError("the client closed the connection before its answer"))
        self.current = None

    def data_received(self, data: bytes) -> None:
        """Parse bytes, piece by piece; keep the rest once requests are found that have to wait."""
        if self._events or self._unparsed:
            self._unparsed += data
            self.transport.pause_reading()
            return
        for start in range(0, len(data), PIECE_BYTES):
            if self._is_last or self.state in (State.DRAINING, State.CLOSING):
                return
            if self._events:
                self._unparsed = data[start:]
                self.transport.pause_reading()
                return
            piece = data if len(data) <= PIECE_BYTES else data[start : start + PIECE_BYTES]
            self._body_bytes = 0
            try:
                self._parse(piece)
            except httptools.HttpParserError:
                self._handle(InvalidRequestError("this is not an HTTP/1.1 request"))
            if self._chunk:
                self._take_chunk(b"")
            self._framing_bytes = 0 if self._body_bytes else self._framing_bytes + len(piece)
            if self._framing_bytes > MAX_HEAD_BYTES and not self._is_last:
                self._handle(HeadTooLargeError(_CHUNKS_TOO_LONG if self._in_body else _HEAD_TOO_LONG))

    def pause_writing(self) -> None:
        """Read nothing more of a client that does not read its responses, and start its clock."""
        self.can_write.clear()
        self.transport.pause_reading()
        self.stalled_since, self.unsent = self.loop.time(), self.transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        """Read again."""
        self.can_write.set()
        self.stalled_since = None
        self._replay()

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        """Start the clock of a request's head."""
        self._in_message = True
        self._framing_bytes = 0
        self._target, self._fields, self._expects = b"", [], False
        if self.state is State.IDLE:
            self.state, self.since = State.READING_HEAD, self.loop.time()

    def on_url(self, url: bytes) -> None:
        """Take a part of the request target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field; trailer fields land in a list that nobody reads."""
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects = True
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        """Begin the request, unless it has to wait."""
        parser = self._parser
        if self._is_last or parser.should_upgrade():  # a head with `Upgrade` is parsed once more, without it
            return
        self._in_body = True
        fields, self._fields = self._fields, []
        if len(fields) > MAX_HEADER_FIELDS:
            self._handle(HeadTooLargeError(f"the request has over {MAX_HEADER_FIELDS} header fields"))
        elif self._framing_bytes + PIECE_BYTES > MAX_HEAD_BYTES and self._measure_head(fields) > MAX_HEAD_BYTES:
            self._handle(HeadTooLargeError(_HEAD_TOO_LONG))
        elif self._target[:1] != b"/" and not self._normalize_target():
            self._handle(InvalidRequestError("the request's target is not a path"))
        else:
            version, method = parser.get_http_version(), parser.get_method().decode("latin-1")
            keep_alive = self._keeps_alive = version != "1.0" and parser.should_keep_alive()
            head = RequestHead(method, self._target, fields, version, keep_alive, self._expects)
            if self._events or self.state is State.WAITING:
                self._events.append(head)
            else:
                self._begin(head)

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._body_bytes += len(body)
        if self._events or self.state is State.WAITING:
            self._events.append(body)
        elif self._chunk:
            self._take_chunk(body)
        else:
            self._chunk = body

    def on_message_complete(self) -> None:
        """Take note that a request is complete."""
        if not self._in_body or self._is_last:
            return
        self._in_message = self._in_body = False
        self._framing_bytes = 0
        self._is_last = not self._keeps_alive
        if self._events or self.state is State.WAITING:
            self._events.append(None)
        else:
            self._complete_request()

    def _parse(self, piece: bytes) -> None:
        """Feed the parser; read a request that asks for another protocol as HTTP/1.1 (RFC 9110, section 7.8).

        The parser takes what follows such a head for the other protocol, and not for a body. So a new parser is given
        the head once more, without the `Upgrade`.
        """
        rest: bytes | memoryview = piece
        while not self._is_last:
            try:
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as pause:
                rest = memoryview(rest)[pause.args[0] :]
            method = self._parser.get_method()
            if method == b"CONNECT":
                self._handle(InvalidRequestError("CONNECT is not answered here; send the path of what is asked for"))
                return
            if self._measure_head(self._fields) > MAX_HEAD_BYTES:
                self._handle(HeadTooLargeError(_HEAD_TOO_LONG))
                return
            lines = [b"%b %b HTTP/%b\r\n" % (method, self._target, self._parser.get_http_version().encode())]
            lines += [b"%b: %b\r\n" % field for field in self._fields if field[0] != b"upgrade"]
            self._open_parser()
            self._parser.feed_data(b"".join([*lines, b"\r\n"]))

    def _normalize_target(self) -> bool:
        """Reduce a target in absolute form to its path and query (RFC 9112, section 3.2.2); tell whether it has any."""
        try:
            url = httptools.parse_url(self._target)
        except httptools.HttpParserError:
            return False
        self._target = (url.path or b"") + (b"?" + url.query if url.query else b"")
        return self._target[:1] == b"/"

    def _measure_head(self, fields: list[tuple[bytes, bytes]]) -> int:
        return len(self._target) + sum(len(name) + len(value) + len(": \r\n") for name, value in fields)

    def _take_chunk(self, following: bytes) -> None:
        """Feed the current request what has been held back, and hold back what follows.

        The last part of a body goes with `finish`, so one that comes as a whole is taken in one step.
        """
        chunk, self._chunk = self._chunk, following
        if self.current is not None and not self._responded:  # else the rest of a body whose request was refused
            self.current.feed(chunk)

    # Requests, one after the other

    def _handle(self, event: _Event) -> None:
        """Handle what the parser found, or keep it while an earlier request waits for its response."""
        self._is_last = self._is_last or isinstance(event, ServiceError)
        if self._events or self.state is State.WAITING:
            self._events.append(event)
        else:
            self._dispatch(event)

    def _dispatch(self, event: _Event) -> None:
        if isinstance(event, RequestHead):
            self._begin(event)
        elif isinstance(event, bytes):
            self._take_chunk(event)
        elif event is None:
            self._complete_request()
        elif self.current is None:
            self.fail(event)
        elif self._responded:  # before its body was found to be broken
            self._end(lingers=False)
        else:
            self.current.cancel(event)

    def _replay(self) -> None:
        """Go on with what was kept, until a request has to wait again; then read again."""
        if self._is_replaying:
            return
        self._is_replaying = True
        while self.state not in (State.WAITING, State.DRAINING, State.CLOSING) and self.can_write.is_set():
            if self._events:
                self._dispatch(self._events.popleft())
            elif self._unparsed:
                data, self._unparsed = self._unparsed, b""
                self.data_received(data)
            else:
                break
        self._is_replaying = False
        if not self._events and not self._unparsed and self.can_write.is_set():
            self.transport.resume_reading()

    def _begin(self, head: RequestHead) -> None:
        """Start a request by its head."""
        self._head, self._keep_alive, self._responded = head, head.keep_alive, False
        self.state, self.since = State.READING_BODY, self.loop.time()
        route = match_target(head.target)
        if route is None:
            self.current = AsgiExchange(self, head)
            return
        headers = read_headers(head.fields)
        request = self.current = PredictRequest(self.app.context, self._respond)
        request.start(head.method, route, headers)
        if head.expects and not self._responded:
            self.transport.write(CONTINUE)

    def _complete_request(self) -> None:
        chunk, self._chunk = self._chunk, b""
        if self._responded:  # it was refused before its body was complete
            self._next()
        else:
            assert self.current is not None
            self.state = State.WAITING
            self.current.finish(chunk)

    def _respond(self, response: Response) -> None:
        """Write a whole response to the current request."""
        if self.transport.is_closing():
            return
        head = self._head
        is_refused_early = self.state is State.READING_BODY and head.expects  # its body may never be sent
        if response.closes or self.app.draining or is_refused_early:
            self._keep_alive = False
        close = b"" if self._keep_alive else b"connection: close\r\n"
        status, fields, body, _ = response
        length = b"content-length: %d\r\n" % len(body)
        self.transport.write(
            b"%b%b%b%b\r\n%b" % (_STATUS_LINES[status], fields, length, close, b"" if head.method == "HEAD" else body)
        )
        self.complete_response(self._keep_alive)

    def complete_response(self, keep_alive: bool) -> None:
        """Take note that the response to the current request is written, and go on with the next request."""
        self._responded = True
        self._keep_alive = keep_alive
        if self.state is State.WAITING and keep_alive:
            self._next()
        elif not keep_alive:
            self._end(lingers=self.state is not State.WAITING or bool(self._events or self._unparsed))

    def _next(self) -> None:
        if not self._keep_alive:
            self._end(lingers=False)
            return
        self.current = None
        self.state = State.READING_HEAD if self._in_message else State.IDLE
        self.since = self.loop.time()
        if self._events or self._unparsed:
            self._replay()

    def fail(self, error: ServiceError, method: str = "-", path: str = "", seconds: float = 0.0) -> None:
        """Respond with a failure of what no other code responds to, record it, and close the connection."""
        if self.current is None:
            self._head = _NO_HEAD  # that of a request before says nothing of this response
        request_id = new_request_id()
        response = build_error_response(error, b"x-request-id: %b\r\n" % request_id, closes=True)
        answered = Answered(method, path, request_id, response.status, seconds, error=str(error))
        self.app.context.recorder.answered.append(answered)
        self._is_last = True
        self._respond(response)

    def _end(self, lingers: bool) -> None:
        """Close the connection, at once or when a client that is still sending has had time to read its response."""
        self._is_last = True
        self._events.clear()
        self._unparsed = b""
        self.since = self.loop.time()
        if lingers and not self.transport.is_closing():
            self.state = State.DRAINING
            self.transport.resume_reading()
            self.transport.write_eof()
        else:
            self.state = State.CLOSING
            self.transport.close()

    def shut_down(self) -> None:
        """Close an idle connection; any other closes with its response, since the application is draining."""
        if self.state in (State.IDLE, State.READING_HEAD):
            self._end(lingers=False)
