"""HTTP/1.1 on httptools (llhttp): what a connection reads becomes requests, in order and within their limits.

A prediction is driven from the parser's callbacks: no task, no ASGI scope, one write. Everything else runs as ASGI; see
`exchange`. What a response says is decided by `service.app` and `service.request` in both cases.

The parser cannot be paused, so what it finds behind a request that has no response yet is kept as events, in order, and
nothing more is read until they have been handled. Sources: RFC 9110 (semantics) and RFC 9112 (HTTP/1.1).
"""

import httptools

from service.api.headers import PredictRoute, RequestHeaders, match_target, new_request_id, read_headers
from service.app import Application
from service.errors import HeadTooLargeError, InvalidRequestError, ServiceError
from service.http.connection import CONTINUE, Connection, State
from service.http.exchange import AsgiExchange
from service.http.head import (
    CHUNKS_TOO_LONG,
    END_OF_HEAD,
    LONGEST_HOST,
    MAX_HEAD_BYTES,
    MAX_HEADER_FIELDS,
    TOO_LONG,
    Event,
    RequestHead,
    check_head,
    is_host,
    known_heads,
    measure_head,
    normalize_target,
    remember_head,
    write_without_upgrade,
)
from service.request import PredictRequest

PIECE_BYTES = 2**14  # parsed at a time: bounds how many requests are found behind one that has no response yet
TURN_REQUESTS = 256  # of one connection in one turn of the event loop, where they can be answered at once


class HttpProtocol(Connection):
    """One connection. See `Connection` for its arguments."""

    def __init__(self, app: Application, connections: set[Connection]) -> None:
        super().__init__(app, connections)
        self._chunk = b""  # of the current request's body, held back
        self._begun = 0  # requests in this turn of the event loop
        # Of the parser, which may be ahead of the current request:
        self._in_body = self._is_replaying = False
        self._framing_bytes = self._body_bytes = 0
        self._target, self._fields = b"", list[tuple[bytes, bytes]]()
        self._hosts, self._expects, self._is_chunked = list[bytes](), False, False
        self._open_parser()

    def _open_parser(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        # What follows `Connection: close` is dropped here; the parser would also heed one in trailer fields.
        self._parser.set_dangerous_leniencies(lenient_keep_alive=True)

    def data_received(self, data: bytes) -> None:
        """Parse bytes, piece by piece; keep the rest once requests are found that have to wait."""
        if self._events or self._unparsed:
            self._unparsed += data
            self.transport.pause_reading()
            return
        self._begun = 0
        is_between = not self._in_message and self.state in (State.IDLE, State.READING_HEAD)
        if is_between and self._take_known(data):
            return
        for start in range(0, len(data), PIECE_BYTES):
            if self._is_last:
                return
            if self._events or self._begun > TURN_REQUESTS:
                self._unparsed = data[start:]
                self.transport.pause_reading()
                if not self._events and not self._is_replaying:
                    self.loop.call_soon(self._replay)
                return
            piece = data if len(data) <= PIECE_BYTES else data[start : start + PIECE_BYTES]
            self._body_bytes = 0
            try:
                try:
                    self._parser.feed_data(piece)
                except httptools.HttpParserUpgrade as pause:
                    self._parse_without_upgrade(memoryview(piece)[pause.args[0] :])
            except httptools.HttpParserError:
                if not self._is_last:  # else it is behind what is answered
                    self._handle(InvalidRequestError("this is not an HTTP/1.1 request"))
            if self._chunk:
                self._take_chunk()
            self._framing_bytes = 0 if self._body_bytes else self._framing_bytes + len(piece)
            if self._framing_bytes > MAX_HEAD_BYTES and not self._is_last:
                self._handle(HeadTooLargeError(CHUNKS_TOO_LONG if self._in_body else TOO_LONG))
        is_alone = is_between and self._begun == 1 and not (self._is_replaying or self._in_message)
        if is_alone and isinstance(self.current, PredictRequest):
            remember_head(data, self._head, self.current.route, self.current.headers)

    def _take_known(self, data: bytes) -> bool:
        """Take a whole request, and nothing else, if its head was read before: it means what it meant then."""
        end = data.find(END_OF_HEAD) + len(END_OF_HEAD)
        known = known_heads.get(data[:end])
        if known is None or known.headers.content_length != len(data) - end:
            return False
        self._begin_prediction(*known, is_known=True)
        if not self._responded:
            assert self.current is not None
            self.state = State.WAITING
            self.current.finish(data[end:])
        elif not self._is_last:
            self._next()
        return True

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        """Start the clock of a request's head."""
        self._in_message = True
        self._framing_bytes = 0
        self._target, self._fields, self._hosts = b"", [], []
        self._expects = self._is_chunked = False
        if self.state is State.IDLE:
            self.state, self.since = State.READING_HEAD, self.loop.time()

    def on_url(self, url: bytes) -> None:
        """Take a part of the request target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field; trailer fields land in lists that nobody reads."""
        name = name.lower()
        if name == b"host":
            self._hosts.append(value)
        elif name == b"transfer-encoding":
            self._is_chunked = True
        elif name == b"expect" and value.lower() == b"100-continue":
            self._expects = True
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        """Begin the request, unless it has to wait, or is refused."""
        parser = self._parser
        if self._is_last or parser.should_upgrade():  # a head with `Upgrade` is parsed once more, without it
            return
        self._in_body = True
        version, fields, hosts = parser.get_http_version(), self._fields, self._hosts
        self._fields = []
        target = self._target
        is_plain = version == "1.1" and target[:1] == b"/" and b"#" not in target and not self._is_chunked
        is_plain = is_plain and len(hosts) == 1 and len(hosts[0]) <= LONGEST_HOST and is_host(hosts[0])
        if not is_plain or len(fields) > MAX_HEADER_FIELDS or self._framing_bytes + PIECE_BYTES > MAX_HEAD_BYTES:
            if self._target[:1] != b"/":
                self._target = normalize_target(self._target)
            try:
                check_head(self._target, fields, version)
            except ServiceError as error:
                self._handle(error)
                return
        method, keep_alive = parser.get_method().decode("latin-1"), parser.should_keep_alive()
        expects = self._expects and version != "1.0"
        head = RequestHead(method, self._target, fields, version, keep_alive, expects)
        if self.state is State.WAITING:
            self._events.append(head)
        else:
            self._begin(head)

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._body_bytes += len(body)
        if self.state is State.WAITING:
            self._events.append(body)
        else:
            self._chunk += body

    def on_message_complete(self) -> None:
        """Take note that a request is complete."""
        if not self._in_body or self._is_last:
            return
        self._in_message = self._in_body = False
        self._framing_bytes = 0
        if self.state is State.WAITING:
            self._events.append(None)
        else:
            self._complete_request()

    def _parse_without_upgrade(self, rest: memoryview) -> None:
        """Read a request that asks for another protocol as HTTP/1.1 (RFC 9110, section 7.8).

        The parser takes what follows such a head for the other protocol, and not for a body. So a new parser is given
        the head once more, without the `Upgrade`.
        """
        while not self._is_last:
            method, version = self._parser.get_method(), self._parser.get_http_version()
            if method == b"CONNECT":
                self._handle(InvalidRequestError("CONNECT is not answered here; send the path of what is asked for"))
                return
            if measure_head(self._target, self._fields) > MAX_HEAD_BYTES:
                self._handle(HeadTooLargeError(TOO_LONG))
                return
            self._open_parser()
            self._parser.feed_data(write_without_upgrade(method, self._target, version, self._fields))
            try:
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as pause:
                rest = rest[pause.args[0] :]

    def _take_chunk(self) -> None:
        """Feed the current request what has been held back of its body.

        The last part of a body goes with `finish`, so one that comes as a whole is taken in one step.
        """
        chunk, self._chunk = self._chunk, b""
        if self.current is not None and not self._responded:  # else the rest of a body whose request was refused
            self.current.feed(chunk)

    # Requests, one after the other

    def _handle(self, event: Event) -> None:
        """Handle what the parser found, or keep it while an earlier request waits for its response."""
        if self.state is State.WAITING:
            self._events.append(event)
        else:
            self._dispatch(event)

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, RequestHead):
            self._begin(event)
        elif isinstance(event, bytes):
            self._chunk += event
        elif event is None:
            self._complete_request()
        elif self.current is None:
            self.fail(event)
        elif self._responded:  # before its body was found to be broken
            self._end(lingers=False)
        else:
            self.current.cancel(event)

    def _replay(self) -> None:
        """Go on with what was kept, until a request has to wait again; then read again, or end if nothing follows."""
        if self._is_replaying:
            return
        self._is_replaying = True
        self._begun = 0
        while self.state not in (State.WAITING, State.DRAINING, State.CLOSING) and self.can_write.is_set():
            if self._events:
                self._dispatch(self._events.popleft())
            elif self._unparsed and self._begun <= TURN_REQUESTS:
                data, self._unparsed = self._unparsed, b""
                self.data_received(data)
            else:
                break
        self._is_replaying = False
        if self.state is State.CLOSING or self._events or not self.can_write.is_set():
            return
        if self._unparsed:
            if self.state is not State.WAITING:
                self.loop.call_soon(self._replay)
        elif not self._is_half_closed:
            self.transport.resume_reading()
        elif self.state is not State.WAITING:
            self._end(lingers=False)

    def _begin(self, head: RequestHead) -> None:
        """Start a request by its head."""
        route = match_target(head.target)
        if route is not None:
            self._begin_prediction(head, route, read_headers(head.fields))
            if head.expects and not self._responded:
                self.transport.write(CONTINUE)
        else:
            self._take_head(head)
            self.current = AsgiExchange(self, head)

    def _begin_prediction(
        self, head: RequestHead, route: PredictRoute, headers: RequestHeaders, is_known: bool = False
    ) -> None:
        self._take_head(head)
        request_id = new_request_id() if is_known else headers.request_id
        request = self.current = PredictRequest(self.app.context, self._respond)
        request.start(head.method, route, headers, request_id)

    def _take_head(self, head: RequestHead) -> None:
        self._head, self._keep_alive, self._responded = head, head.keep_alive, False
        self.state, self.since = State.READING_BODY, self.loop.time()
        self._begun += 1

    def _complete_request(self) -> None:
        chunk, self._chunk = self._chunk, b""
        if self._responded:  # it was refused before its body was complete
            self._next()
        else:
            assert self.current is not None
            self.state = State.WAITING
            self.current.finish(chunk)
