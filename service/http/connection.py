"""The limits on what a connection may do: how long heads and bodies may be and take, how it is refused and how it ends.

uvicorn (https://www.uvicorn.org) parses HTTP with llhttp and keeps connections alive; these are the limits it lacks.
"""

import asyncio
from collections.abc import Iterable

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.headers import new_request_id
from service.app import Application
from service.errors import (
    DeadlineExceededError,
    HeadTooLargeError,
    InvalidRequestError,
    ServiceError,
    UnavailableError,
)
from service.request import CLOSE, Prediction, encode_failure
from service.telemetry import metrics

MAX_HEAD_BYTES = 2**16
LINGER_SECONDS = 2.0  # for a client that is still sending to read why it was refused; TCP drops the answer otherwise
HEAD_TOO_LONG = f"the request's head is over the limit of {MAX_HEAD_BYTES} bytes"
_CHUNKS_TOO_LONG = f"the request has over {MAX_HEAD_BYTES} bytes of chunk extensions or trailer fields"


class Flow(FlowControl):
    """uvicorn's flow control; nothing more is read of a client while it does not read its answers."""

    def resume_reading(self) -> None:
        """Read again, unless answers wait."""
        if self.read_paused and not self.write_paused:
            self.read_paused = False
            self._transport.resume_reading()


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol within limits; its `app` is an `Application`."""

    app: Application
    _prediction: Prediction | None = None  # whose body is being read
    _active: Prediction | RequestResponseCycle | None = None  # the oldest that is not answered
    _head_since: float | None = None
    _body_since: float | None = None  # of a request left to uvicorn
    _idle_since: float | None = None
    _ending_since: float | None = None
    _stalled_since: float | None = None  # no byte of its answers, of which too many wait
    _unsent = 0  # bytes of answers when it was looked at last
    _deaf = False  # nothing more is read of it
    _head_bytes = 0  # since the head began, or the last part of a body came
    _unread = 0  # of the segment that is being read, without the parts of bodies in it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin a connection, or refuse it where there are too many."""
        super().connection_made(transport)
        self.flow = Flow(transport)
        self.app.arrival.set()
        self._head_since = self.loop.time()
        if len(self.connections) > self.app.settings.max_connections:
            self._refuse(UnavailableError("there are too many open connections; try again in a moment"))

    def data_received(self, data: bytes) -> None:
        """Read on, as long as what is not a body stays within its limit: heads, and what stands around chunks."""
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        self._unread = len(data)
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as pause:
                self._read_without_upgrade(memoryview(data)[pause.args[0] :])
        except httptools.HttpParserError:
            self._refuse(InvalidRequestError("this is not an HTTP/1.1 request"))
        self._head_bytes += self._unread
        if self._head_bytes > MAX_HEAD_BYTES:
            if self._head_since is not None:
                self._refuse(HeadTooLargeError(HEAD_TOO_LONG))
            elif self._prediction is not None or self._body_since is not None:
                self._refuse(HeadTooLargeError(_CHUNKS_TOO_LONG))

    def _read_without_upgrade(self, rest: memoryview) -> None:
        """Read a request that asks for another protocol as HTTP/1.1 all the same, as RFC 9110 (7.8) has it.

        The parser takes what follows such a head for the other protocol, and not for a body. So another parser is given
        the head once more, without the `Upgrade`; how long the body is, it finds out as for any other request.
        """
        while not self._deaf and not self.transport.is_closing():
            method = self.parser.get_method()
            if method == b"CONNECT":
                self._refuse(InvalidRequestError("CONNECT is not answered here; send the path of what is asked for"))
                return
            lines = [b"%b %b HTTP/%b\r\n" % (method, self.url, self.parser.get_http_version().encode())]
            lines += [b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade"]
            head = b"".join([*lines, b"\r\n"])
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            self._unread = len(head)
            self.parser.feed_data(head)
            self._unread = len(rest)
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as pause:  # the next request asks for one, too
                rest = rest[pause.args[0] :]

    def _measure_head(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers)

    def _is_busy(self) -> bool:
        return self._active is not None and not self._active.response_complete

    def _refuse(self, error: ServiceError) -> None:
        """Answer a connection whose request cannot be read, and close it."""
        if self._deaf or self.transport.is_closing():
            return
        self._deaf = True
        self._head_since = None
        prediction, active = self._prediction, self._active
        if prediction is not None and not prediction.done():  # it is its own body that cannot be read
            prediction.keep_alive = False
            prediction.set_exception(error)
            return
        in_body = prediction is not None or self._body_since is not None
        if active is not None and self._is_busy() and not (in_body and active is self.cycle):
            active.keep_alive = False  # an answer now would be taken for that of a request before
            self.pipeline.clear()
            self.flow.pause_reading()
            return
        if in_body and not self._is_busy():  # it was answered before its body was complete
            self._end(lingers=False)
            return
        if active is not None and in_body:
            active.disconnected = True  # it must not answer, too
            active.message_event.set()
        request_id = new_request_id()
        self.app.record_other(request_id, "-", error.status, 0.0, str(error))
        self.transport.write(encode_failure(error, b"x-request-id: %b\r\n" % request_id + CLOSE))
        self._end(lingers=not isinstance(error, UnavailableError))

    def _end(self, lingers: bool) -> None:
        """Close the connection, at once or when a client that is still sending has had time to read its answer."""
        self._ending_since = self.loop.time()
        self._deaf = True
        if lingers:
            self.flow.resume_reading()
            self.transport.write_eof()
        else:
            self.transport.close()

    def check_time(self, now: float) -> None:
        """Give up on a head, a body or a next request that takes too long; `now` is the event loop's time."""
        settings = self.app.settings
        if self._stalled_since is not None:
            self._check_reader(now, self._stalled_since)
            return
        if self._ending_since is not None or self.transport.is_closing():
            self._ending_since = self._ending_since or now
            left = settings.request_timeout if self.transport.is_closing() else LINGER_SECONDS
            if now - self._ending_since > left:  # closing takes as long as a client takes to read its answer
                self.transport.abort()
            return
        if self._idle_since is not None and now - self._idle_since > self.timeout_keep_alive:
            self.transport.close()
        if self._head_since is not None and not self._is_busy() and now - self._head_since > settings.header_timeout:
            self._give_up("slow")
        if self._body_since is not None and self._active is not self.cycle:
            self._body_since = now  # nothing is read of it yet, for the client waits for an earlier answer
        if self._body_since is not None and now - self._body_since > settings.request_timeout + LINGER_SECONDS:
            self._give_up("slow")
        prediction = self._prediction
        if prediction is not None and not prediction.done() and prediction.deadline < now:
            prediction.keep_alive = False
            prediction.set_exception(DeadlineExceededError("the body did not arrive by the request's deadline"))

    def _check_reader(self, now: float, since: float) -> None:
        """Cut a client off that reads nothing of its answers; one that reads slowly has all the time it takes."""
        before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
        self._stalled_since = now if self._unsent < before else since
        if now - self._stalled_since > self.app.settings.request_timeout:
            metrics.record_dropped("slow")
            self.transport.abort()
        # Nothing is read of it meanwhile, and so its other clocks stand still.
        self._head_since = self._head_since and now
        self._body_since = self._body_since and now
        self._idle_since = self._idle_since and now
        self._ending_since = self._ending_since and now

    def _give_up(self, reason: str) -> None:
        metrics.record_dropped(reason)
        self.transport.close()

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read its answers, and start its clock."""
        super().pause_writing()
        self.flow.pause_reading()
        self._stalled_since, self._unsent = self.loop.time(), self.transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        """Read again."""
        super().resume_writing()
        self._stalled_since = None
        self.flow.resume_reading()


def check_times(connections: Iterable[asyncio.Protocol], now: float) -> None:
    """See `LimitedProtocol.check_time`, for every connection of a worker."""
    for connection in list(connections):
        if isinstance(connection, LimitedProtocol):
            connection.check_time(now)
