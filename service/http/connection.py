"""One connection: what it is doing and since when, the responses that are written to it, and its end."""

import asyncio
import http
from collections import deque
from enum import Enum, auto

from service.api.headers import new_request_id
from service.api.responses import Response, build_error_response
from service.app import Application
from service.errors import ClientClosedError, ServiceError, UnavailableError
from service.http.exchange import AsgiExchange
from service.http.head import CONNECTION_FIELDS, NO_HEAD, Event
from service.request import PredictRequest
from service.telemetry.recorder import Answered

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES = {int(status): f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}


class State(Enum):
    """What a connection is doing."""

    IDLE = auto()  # between two requests
    READING_HEAD = auto()
    READING_BODY = auto()
    WAITING = auto()  # for the response to a complete request
    DRAINING = auto()  # the last response is written; a client that still sends gets a moment to read it
    CLOSING = auto()


class Connection(asyncio.Protocol):
    """The side of a connection that writes; `HttpProtocol` adds the one that reads.

    Args:
        app: answers the requests.
        connections: lists the connection while it is open.
    """

    transport: asyncio.Transport

    def __init__(self, app: Application, connections: set["Connection"]) -> None:
        self.app = app
        self.connections = connections
        self.loop = asyncio.get_running_loop()
        self.state = State.READING_HEAD
        self.since = self.loop.time()  # when the state began
        self.current: PredictRequest | AsgiExchange | None = None
        self.stalled_since: float | None = None  # since when the client reads none of the responses that wait for it
        self.unsent = 0  # bytes of those responses that count as held
        self.is_probed = False
        self.can_write = asyncio.Event()
        self.can_write.set()
        # Of the current request:
        self._head = NO_HEAD
        self._keep_alive = True
        self._responded = False
        # Of what is read, which may be ahead of the current request:
        self._events: deque[Event] = deque()
        self._unparsed = b""
        self._in_message = self._is_last = self._is_half_closed = False

    def _replay(self) -> None:
        """Go on with what was read behind a request that has been answered, and then read again."""
        raise NotImplementedError

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
        self.unsent = self.app.context.hold(self.unsent, 0)
        if self.current is not None and not self._responded:
            self.current.cancel(ClientClosedError("the client closed the connection before its answer"))
        self.current = None

    def eof_received(self) -> bool:
        """Keep the connection of a client that sends no more for as long as there is something to answer."""
        self._is_half_closed = True
        if self.state is State.WAITING:
            self.probe()
            return True
        return bool(self._events or self._unparsed)

    def probe(self) -> None:
        """Find out whether a client that sends no more still reads, for both look the same from here.

        It is sent a `100 Continue`, which a client of HTTP/1.1 has to ignore where it did not ask for it (RFC 9110,
        section 15.2.1). The system of one that has gone refuses it, and `timeouts` notices that.
        """
        is_started = isinstance(self.current, AsgiExchange) and self.current.started
        if not self.is_probed and not is_started and self._head.version != "1.0":
            self.transport.write(CONTINUE)
        self.is_probed = True

    def pause_writing(self) -> None:
        """Read nothing more of a client that does not read its responses, and start its clock."""
        self.can_write.clear()
        self.transport.pause_reading()
        self.stalled_since = self.loop.time()
        self.count_unsent()

    def resume_writing(self) -> None:
        """Read again."""
        self.can_write.set()
        self.stalled_since = None
        self.count_unsent()
        self._replay()

    def count_unsent(self) -> None:
        """Count the responses that the client has not read as held by the worker."""
        self.unsent = self.app.context.hold(self.unsent, self.transport.get_write_buffer_size())

    def _respond(self, response: Response) -> None:
        """Write a whole response to the current request."""
        if self.transport.is_closing():
            return
        head = self._head
        is_refused_early = self.state is State.READING_BODY and head.expects  # its body may never be sent
        if response.closes or self.app.draining or is_refused_early:
            self._keep_alive = False
        status, fields, body, _ = response
        length = b"%bcontent-length: %d\r\n" % (self.app.date, len(body))
        connection = CONNECTION_FIELDS[self._keep_alive, head.version]
        body = b"" if head.method == "HEAD" else body
        self.transport.write(b"%b%b%b%b\r\n%b" % (_STATUS_LINES[status], fields, length, connection, body))
        self.complete_response(self._keep_alive)

    def complete_response(self, keep_alive: bool) -> None:
        """Take note that the response to the current request is written, and go on with the next request."""
        self._responded = True
        if self.state is State.WAITING and keep_alive:
            self._next()
        elif not keep_alive:
            self._end(lingers=self.state is not State.WAITING or bool(self._events or self._unparsed))

    def _next(self) -> None:
        self.current = None
        self.state = State.READING_HEAD if self._in_message else State.IDLE
        self.since = self.loop.time()
        if self._events or self._unparsed or self._is_half_closed:
            self._replay()

    def fail(self, error: ServiceError, method: str = "-", path: str = "", seconds: float = 0.0) -> None:
        """Respond with a failure of what no other code responds to, record it, and close the connection."""
        if self.current is None:
            self._head = NO_HEAD  # that of a request before says nothing of this response
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
